"""`llmjax size --reduce`: train ever smaller models on the same tokens, and find the smallest within a loss."""

from collections.abc import Iterator, Sequence
import dataclasses
import logging
import math

from etils import epath

from llmjax import atomic
from llmjax.binding import differences
from llmjax.data.store import prepare
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.plan.units import short
from llmjax.run import config as run_config, loading, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.inspection import align
from llmjax.sweep import training

RUNGS = "rungs"  # rungs/<layers>x<width>: the workdir of each run
RESULT = "reduce.json"
_MLP_MULTIPLE = 8
_LAYERS = ("num_layers", "num_decoder_layers")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """A model of the ladder: the overrides of its size, and what is known of it. loss: nats per target.
    seconds: of its run, where that has recorded them."""

    overrides: tuple[tuple[str, str], ...]
    name: str
    parameters: int
    flops_per_token: float
    loss: float = math.nan
    seconds: float | None = None


def make_ladder(config: RunConfig, count: int) -> list[Rung]:
    """The config's own model, and up to `count` smaller ones, each with about half the weights in its blocks.

    Width and depth shrink by 2^(-k/3). The size of a head stays, so widths are multiples of it; the feed-forward width
    shrinks like the width. Raises UserError for a family without attention heads, and where nothing smaller is left.
    """
    model = config.model
    heads = getattr(model, "num_heads", 0)
    if not heads or not hasattr(model, "mlp_size"):
        raise UserError(f"--reduce: model.family={model.family!r} has no attention heads to take away; use a sweep")
    rungs = [_make_rung(config, ())]
    for k in range(1, 4 * count + 1):
        rung = _shrink(config, 2 ** (-k / 3))
        if rung is not None and rung.parameters < rungs[-1].parameters:
            rungs.append(rung)
        if len(rungs) > count:
            break
    if len(rungs) == 1:
        raise UserError(f"--reduce: no smaller model than {model.num_layers} layers and {heads} heads; nothing to do")
    return rungs


def _shrink(config: RunConfig, factor: float) -> Rung | None:
    """The model at that fraction of width and depth; None where there is no valid one."""
    model = config.model
    heads = max(1, round(model.num_heads * factor))  # pyright: ignore[reportAttributeAccessIssue]
    scale = heads / model.num_heads  # pyright: ignore[reportAttributeAccessIssue]
    embed = model.embed * heads / model.num_heads  # pyright: ignore[reportAttributeAccessIssue]
    if embed != int(embed):
        return None
    changes = {"embed": int(embed), "num_heads": heads}
    if kv_heads := getattr(model, "num_kv_heads", 0):
        most = max(1, kv_heads * scale)
        changes["num_kv_heads"] = max(n for n in range(1, kv_heads + 1) if heads % n == 0 and n <= most)
    if getattr(model, "mlp", 0):
        changes["mlp"] = max(1, round(model.mlp * scale / _MLP_MULTIPLE)) * _MLP_MULTIPLE  # pyright: ignore
    depths = {field: math.ceil(layers * factor - 0.5) or 1 for field in _LAYERS if (layers := getattr(model, field, 0))}
    for fields in ({**changes, **depths}, changes):  # a pattern of layers may need the depth
        try:
            smaller = dataclasses.replace(config, model=dataclasses.replace(model, **fields))
            return _make_rung(smaller, tuple((f"model.{name}", str(value)) for name, value in fields.items()))
        except UserError:
            continue
    return None


def _make_rung(config: RunConfig, overrides: tuple[tuple[str, str], ...]) -> Rung:
    model = config.model
    return Rung(
        overrides=overrides,
        name=f"{model.num_layers}x{model.embed}",
        parameters=registry.count_parameters(model),
        flops_per_token=run_config.flops_per_token(config, config.data.seq_len),
    )


def reduce(
    spec: str, overrides: Sequence[tuple[str, str]], workdir: epath.Path, *, max_loss_increase: float, count: int
) -> list[str]:
    """Train the ladder from the largest model on, until the loss rises by more than `max_loss_increase`.

    Each rung is a run in WORKDIR/rungs; finished runs are read, interrupted ones resumed. Writes WORKDIR/reduce.json.
    Returns the lines of the result. Raises UserError where a run fails, and where the folder has another ladder.
    """
    if atomic.is_remote(workdir) or (workdir / workdirs.CONFIG).exists():
        raise UserError(f"--workdir={workdir}: give a new folder on a local or shared disk for the ladder")
    config = run_config.resolve(spec, overrides)
    if not max_loss_increase >= 0:
        raise UserError(f"--max_loss_increase={max_loss_increase}: must not be negative")
    if config.train.epochs or config.eval.stop_after:
        raise UserError("--reduce compares models after the same tokens: set train.steps, with eval.stop_after=0")
    resolved, path = run_config.to_json(config), workdir / RESULT
    saved = workdirs.read_json(path)
    if saved is not None and (changes := differences(saved["config"], resolved)):
        listed = "; ".join(f"{field}: {old!r} -> {new!r}" for field, old, new in changes)
        raise UserError(f"{path}: the ladder there has another config ({listed}); give another --workdir")
    store = loading.store_folder(config, workdir)
    prepare.prepare(config.data, store)
    config = run_config.with_objective(config, run_config.objective(config, load_tokenizer(store)))
    rungs, trained = make_ladder(config, count), []
    shared = [*overrides, ("data.store", str(store.resolve()))]
    workdirs.write_json(path, {"config": resolved, "rungs": []})
    with workdirs.Lock(workdir, primary=True):
        for rung in rungs:
            trained.append(_train(rung, spec, shared, workdir / RUNGS / rung.name))
            workdirs.write_json(path, {"config": resolved, "rungs": [dataclasses.asdict(each) for each in trained]})
            if trained[-1].loss > trained[0].loss + max_loss_increase:
                break
    return list(_describe(trained, len(rungs), workdir, max_loss_increase))


def _train(rung: Rung, spec: str, overrides: Sequence[tuple[str, str]], folder: epath.Path) -> Rung:
    """The rung with its loss and seconds; a finished run is read."""
    record = workdirs.read_json(folder / "rung.json")
    if record is not None:
        return dataclasses.replace(rung, loss=record["loss"], seconds=record["seconds"])
    logger.info("training %s: %s parameters (%s)", rung.name, short(rung.parameters), folder)
    outcome = training.run(training.command(spec, folder, [*overrides, *rung.overrides]), folder)
    if outcome.status:
        raise UserError(f"{folder / training.LOG}: training ended with status {outcome.status}: {outcome.error}")
    loss = training.find_score(training.read_scores(folder, "loss"), "loss", keeps_best=False)
    if not math.isfinite(loss):
        raise UserError(f"{folder}: no validation loss; raise data.split.validation, or look at {training.LOG} there")
    record = {"loss": loss, "seconds": training.read_seconds(folder)}
    workdirs.write_json(folder / "rung.json", record)
    logger.info("  loss %.4f after %.0f s", loss, outcome.seconds)
    return dataclasses.replace(rung, **record)


def choose(rungs: Sequence[Rung], max_loss_increase: float) -> Rung:
    """The smallest model whose loss is within `max_loss_increase` of the first one's."""
    within = [rung for rung in rungs if rung.loss <= rungs[0].loss + max_loss_increase]
    return min(within, key=lambda rung: rung.parameters)


def _describe(rungs: Sequence[Rung], count: int, workdir: epath.Path, limit: float) -> Iterator[str]:
    first, chosen = rungs[0], choose(rungs, limit)
    yield ""
    rows = [("layers x width", "parameters", "FLOPs a token", "loss", "increase", "seconds", "")]
    for rung in rungs:
        relative = f"{rung.flops_per_token / first.flops_per_token:.0%}"
        losses = (f"{rung.loss:.4f}", f"{rung.loss - first.loss:+.4f}")
        seconds = "\u2014" if rung.seconds is None else f"{rung.seconds:.0f}"
        mark = "<- smallest within" if rung is chosen else ""
        rows.append((rung.name, short(rung.parameters), relative, *losses, seconds, mark))
    yield from align(rows)
    yield ""
    if chosen is first:
        yield f"no smaller model is within {limit:g} nats: keep the config's, or raise --max_loss_increase"
    else:
        share = chosen.parameters / first.parameters
        increase = f"loss {chosen.loss - first.loss:+.4f} (limit {limit:g})"
        yield f"{chosen.name}: {share:.0%} of the parameters, {increase}; as overrides:"
        yield f"  {training.quote_flags(chosen.overrides)}"
    if chosen is rungs[-1] and len(rungs) == count:
        yield "  the smallest model of the ladder is within the limit: more --rungs may find a smaller one"
    yield "  the learning rate is the config's at every size; smaller models often want a higher one (llmjax sweep)"
    yield f"next:   llmjax eval --workdir={workdir / RUNGS / chosen.name} --split=test"
