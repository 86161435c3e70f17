"""The settings of a sweep on disk: what a process that joins or resumes it must have in common with the first one."""

from collections.abc import Sequence
import dataclasses
import os
import pathlib

from etils import epath

from llmjax import atomic
from llmjax.binding import differences
from llmjax.data.store import prepare
from llmjax.errors import UserError
from llmjax.run import config as run_config, loading, phases, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.sweep import space, training
from llmjax.sweep.study import Plan

SETTINGS = "sweep.json"
TRIALS = 12  # the default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line of a sweep."""

    config: str
    over: tuple[str, ...]
    overrides: tuple[tuple[str, str], ...] = ()
    sampler: str = "tpe"
    prune: str = ""
    seed: int = 0
    trials: int = TRIALS


def resolve_settings(
    workdir: epath.Path,
    *,
    config: str | None,
    over: Sequence[str],
    overrides: Sequence[tuple[str, str]],
    sampler: str | None,
    prune: str | None,
    seed: int | None,
    trials: int | None,
) -> Settings:
    """The settings of the command line, with those of WORKDIR/sweep.json for what is not given.

    Raises UserError where a sweep has other settings already; more --trials extend it.
    """
    if atomic.is_remote(workdir):
        raise UserError(
            f"--workdir={workdir}: processes share a journal there by file locks; give a local or shared disk"
        )
    saved, is_import = workdirs.read_json(workdir / SETTINGS), (workdir / workdirs.IMPORT).exists()
    if (workdir / workdirs.RUN).exists() or ((workdir / workdirs.CONFIG).exists() and not is_import):
        raise UserError(f"--workdir={workdir}: contains a training run; give another folder for the sweep")
    if saved is None:
        if not over:
            raise UserError(
                "--over is missing: name a field and its range, --over='optimizer.learning_rate=log(1e-4,1e-2)'"
            )
        if config is None:
            raise UserError("--config is missing: give a name that `llmjax configs` lists, or a Python file")
        saved = {}
    given = {
        "config": config and _absolute(config),
        "over": list(over) or None,
        "overrides": [list(pair) for pair in overrides] or None,
        "sampler": sampler,
        "prune": prune,
        "seed": seed,
        "trials": trials,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name != "trials" and saved and saved[name] != value:
            flag = "config.FIELD" if name == "overrides" else name
            raise UserError(
                f"--{flag}: {_show(value)}, but the sweep in {workdir} has {_show(saved[name])}; leave it out to "
                "join or resume it, or give another --workdir"
            )
    fields = {**saved, **given}
    pairs = tuple((field, text) for field, text in fields.get("overrides", ()))
    known = {field.name for field in dataclasses.fields(Settings)}
    chosen = {name: value for name, value in fields.items() if name in known}
    return Settings(**{**chosen, "over": tuple(fields["over"]), "overrides": pairs})


def make_plan(settings: Settings, workdir: epath.Path) -> tuple[Settings, Plan]:
    """Check the ranges against the config, prepare the shared token store, write sweep.json.

    Raises UserError for a range that the config does not take, and where the config has changed since the sweep began.
    """
    ranges = space.parse(settings.over)

    def resolve(more: Sequence[tuple[str, str]]) -> RunConfig:
        config = loading.resolve(settings.config, workdir, [*settings.overrides, *more])
        if not config.train.epochs:  # else the data decide the number of steps
            phases.check_rates(config)
        return config

    config = resolve([])
    space.check(ranges, settings.overrides, resolve)
    if settings.sampler == "grid":
        for each in ranges:
            _ = each.grid
    if settings.prune == "median" and not config.eval.every:
        raise UserError(
            "--prune=median: compares evaluations during training, and eval.every=0; set --config.eval.every"
        )
    settings = dataclasses.replace(settings, prune=settings.prune or ("median" if config.eval.every else "none"))
    _check_unchanged(config, workdir)
    is_import = (workdir / workdirs.IMPORT).exists()
    for field in [each.field for each in ranges if is_import]:
        section, _, name = field.partition(".")
        if section == "model" and name not in run_config.FREE_MODEL_FIELDS and not name.startswith("lora."):
            raise UserError(f"--over={field}: the imported parameters decide it; vary other fields")
    shared: list[tuple[str, str]] = []
    if is_import and config.data.tokenizer.path:  # the store has it on record, and each trial has a copy elsewhere
        shared.append(("data.tokenizer.path", config.data.tokenizer.path))
    if all(each.field != "data.store" for each in ranges):
        store = loading.store_folder(config, workdir)
        prepare.prepare(config.data, store)
        shared.append(("data.store", str(store.resolve())))
    workdir.mkdir(parents=True, exist_ok=True)
    record = {**dataclasses.asdict(settings), "resolved": run_config.to_json(config)}
    workdirs.write_json(workdir / SETTINGS, record)

    def command(overrides: Sequence[tuple[str, str]], folder: epath.Path) -> list[str]:
        if is_import:
            loading.copy_import(workdir, folder)
        return training.command(settings.config, folder, [*settings.overrides, *shared, *overrides])

    plan = Plan(
        ranges=ranges,
        metric=config.eval.metric,
        keeps_best=bool(config.checkpoint.keep_best),
        sampler=settings.sampler,
        pruner=settings.prune,
        seed=settings.seed,
        trials=settings.trials,
        command=command,
    )
    return settings, plan


def _check_unchanged(config: RunConfig, workdir: epath.Path) -> None:
    saved = (workdirs.read_json(workdir / SETTINGS) or {}).get("resolved")
    if saved is not None and (changes := differences(saved, run_config.to_json(config))):
        listed = "; ".join(f"{field}: {old!r} -> {new!r}" for field, old, new in changes)
        raise UserError(f"the config has changed since the sweep in {workdir} began ({listed}); give another --workdir")


def _absolute(spec: str) -> str:
    """A file by its absolute path, so that a sweep is resumed from any folder; the name of a shipped config stays."""
    file, colon, size = spec.partition(":")
    return os.path.abspath(os.path.expanduser(file)) + colon + size if pathlib.Path(file).suffix == ".py" else spec


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
