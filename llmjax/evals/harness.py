"""Evaluation: score every document of a split exactly once, on any mesh."""

from collections.abc import Callable
import dataclasses
import logging
import math
import pathlib
import time
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Batch, Graph, Params
from llmjax.data.batches.pipeline import EvalData
from llmjax.data.config import PREFERENCES, ObjectiveConfig
from llmjax.data.objectives.objective import Objective
from llmjax.data.store import prepare
from llmjax.data.store.manifest import has_dialogues
from llmjax.data.store.token_store import compute_fingerprint
from llmjax.errors import UserError
from llmjax.evals.label_scores import baseline_accuracy, describe_baseline, macro_f1, pearson, spearman
from llmjax.evals.reference import Reference, read_reference
from llmjax.models import registry
from llmjax.nn import losses
from llmjax.nn.class_names import make_class_batch, score_names
from llmjax.nn.pair_losses import choose_loss, find_records, text_cosines
from llmjax.parallel import axes, backends, hosts, virtual_shards
from llmjax.run import config as run_config, next_commands, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0


@dataclasses.dataclass
class Sums:
    """Exact totals of a split, float64 on the host, so that they depend on no batch size and no mesh.

    num_targets     scored targets
    correct         targets that had the highest probability
    num_tokens      tokens of the documents, if the objective is causal; else 0
    target_counts   [vocab], how often each id was a target; 0 where that is not counted (causal without dialogues)
    confusion       of classes, see label_scores; 0 for other objectives
    numbers         [(prediction, label), ...] of the objectives regress and similarity
    margin          summed difference in reward of the answers of preferences
    chance          expected number of correct records of a random choice; 0 for objectives on documents
    """

    nats: float = 0.0
    num_targets: float = 0.0
    num_tokens: int = 0
    correct: float | None = 0.0
    text_bytes: int = 0
    documents: int = 0
    target_counts: Any = 0
    confusion: Any = 0
    numbers: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    margin: float | None = 0.0
    chance: float = 0.0

    def add(self, other: "Sums") -> None:
        """Add the totals of other documents."""
        for field in dataclasses.fields(self):
            old, new = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, None if old is None or new is None else old + new)

    def scores(self) -> dict[str, Any]:
        """Totals, and means over the scored targets, JSON-ready.

        loss               nats per target
        bits_per_byte      causal: all nats, first tokens and EOS included, over the original UTF-8 bytes; None for
                           dialogues, of which not all tokens are scored, and for other objectives
        accuracy           share of the targets that had the highest probability; regress, similarity: None
        baseline_accuracy  that of always predicting the most frequent target; None where targets are not counted
        chance_accuracy    records of several texts: that of a random choice, in place of the baseline
        margin             preferences: the mean difference in reward of the chosen and the rejected answer
        macro_f1           classify: the mean F1 score of the classes
        pearson, spearman  regress, similarity: correlations of predictions and labels
        """
        num_targets = max(self.num_targets, 1)
        loss, is_whole = self.nats / num_targets, 0 < self.num_targets == self.num_tokens
        if np.any(self.confusion) or self.numbers or self.chance:
            return self._label_scores(loss, num_targets)
        assert self.correct is not None
        most_frequent = np.max(self.target_counts)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / max(self.text_bytes, 1) if is_whole else None,
            "accuracy": self.correct / num_targets,
            "baseline_accuracy": float(most_frequent) / num_targets if most_frequent else None,
            "nats": self.nats,
            "num_targets": int(self.num_targets),
            "text_bytes": self.text_bytes,
            "documents": self.documents,
        }

    def _label_scores(self, loss: float, num_targets: float) -> dict[str, Any]:
        scores: dict[str, Any] = {"loss": loss, "perplexity": None, "bits_per_byte": None}
        if self.correct is None:
            predicted, actual = np.array(self.numbers).T
            correlations = {"pearson": pearson(predicted, actual), "spearman": spearman(predicted, actual)}
            scores |= {"accuracy": None, "baseline_accuracy": None, **correlations}
        elif self.chance:
            scores |= {"accuracy": self.correct / num_targets, "baseline_accuracy": None}
            scores["chance_accuracy"] = self.chance / num_targets
            scores |= {} if self.margin is None else {"margin": self.margin / num_targets}
        else:
            scores |= {"accuracy": self.correct / num_targets, "baseline_accuracy": baseline_accuracy(self.confusion)}
            scores["macro_f1"] = macro_f1(self.confusion)
        counts = {"num_targets": int(self.num_targets), "text_bytes": self.text_bytes, "documents": self.documents}
        return scores | {"nats": self.nats} | counts


def make_score(
    graph: Graph, config: RunConfig, *, counts_targets: bool, class_names: np.ndarray | None = None
) -> Callable[[Params, Batch], Any]:
    """A compiled function (params, batch) -> (LossSums, what `Sums` counts of targets or labels).

    class_names  of the objective: the log-likelihoods of names are scored as the logits of a head for classes are
    """
    vocab_size, chunk = config.model.vocab_size, config.train.loss_chunk
    batch_loss = choose_loss(config.objective)

    def score(params: Params, batch: Batch) -> tuple[losses.LossSums, dict[str, Any]]:
        model = nnx.merge(graph, params)
        if class_names is not None:
            names = jnp.asarray(class_names)
            outputs, classes = score_names(model, batch, names), make_class_batch(batch, names)
            return batch_loss(outputs, lambda x: x, classes, chunk=chunk, z_loss=0.0), _count_labels(outputs, classes)
        hidden = model(batch).hidden
        sums = batch_loss(hidden, model.unembed, batch, chunk=chunk, z_loss=0.0)
        if batch.num_texts:
            return sums, _count_records(hidden, batch, config.objective)
        if config.model.num_outputs:
            return sums, _count_labels(model.unembed(hidden), batch)
        return sums, {"target_counts": _count(batch.targets, batch.weights, vocab_size)} if counts_targets else {}

    if config.parallel.reduction == "xla":
        replicated = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec())
        return jax.jit(score, out_shardings=replicated)
    _, shapes, names = registry.abstract(config.model)
    in_tree = virtual_shards.make_sums(score, names, axes.shardings(names, shapes), config.parallel.virtual_shards)
    return jax.jit(in_tree, compiler_options=virtual_shards.compiler_options())


class Evaluator:
    """Scores parameters on the splits of a store, on the mesh of `use_mesh`; compiles the scoring step once.

    manifest   that of the store
    reference  log-likelihoods of the answers under the reference model, for the objective dpo
    settings   a fingerprint of everything that a score depends on, except the parameters
    """

    def __init__(
        self,
        graph: Graph,
        config: RunConfig,
        objective: Objective,
        store: pathlib.Path,
        manifest: dict[str, Any],
        reference: Reference | None = None,
    ):
        self.config, self.objective, self.store, self.manifest = config, objective, store, manifest
        self.batch = config.eval.batch or config.train.global_batch
        self.sharding = backends.batch_sharding()
        field = "eval.batch" if config.eval.batch else "train.global_batch"
        backends.check_batch(field, self.batch)
        if config.parallel.reduction == "fixed_tree":
            virtual_shards.check(config.parallel, field, self.batch)
        self.rows = hosts.local_rows(self.sharding, self.batch)
        if objective.min_vocab_size > config.model.vocab_size:
            raise UserError(
                f"objective.name={objective.name!r} needs {objective.min_vocab_size} ids, but "
                f"model.vocab_size={config.model.vocab_size}: evaluate with the objective of training"
            )
        self._reference = reference or {}
        self.settings = _fingerprint_settings(config, manifest)
        self._causal = objective.name == "causal"
        counts_targets = not self._causal or has_dialogues(manifest)
        self._score = make_score(graph, config, counts_targets=counts_targets, class_names=objective.class_names)

    def score_split(
        self, params: Params, split: str, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Scores of a split, in total and by source: {"split", "settings", "total": {...}, "sources": {name: {...}}}.

        should_stop   called before each batch, on all processes; where it returns True, the result is None
        """
        total, sources = Sums(), {}
        for name, source in self.manifest["sources"].items():
            if not source[split]["tokens"]:
                continue
            sums = self._score_source(params, name, split, should_stop)
            if sums is None:
                return None
            if "dialogues" in source and not sums.num_targets:
                logger.info("  %s/%s: no assistant turn fits data.seq_len, so nothing is scored", split, name)
                continue
            sources[name] = sums.scores()
            total.add(sums)
        if not sources:
            raise UserError(
                f"--split={split}: that split of {self.store} is empty; raise data.split.{split} and prepare again"
            )
        scores = {"split": split, "settings": self.settings, "total": total.scores(), "sources": sources}
        if self._causal and not self.manifest["tokenizer"]["lossless"]:
            scores["note"] = "the tokenizer loses text: bits per byte count only what it keeps, over all original bytes"
        return scores

    def _score_source(self, params: Params, name: str, split: str, should_stop: Callable[[], bool]) -> Sums | None:
        data = EvalData(
            self.store,
            self.config.data,
            split=split,
            source=name,
            batch=self.batch,
            objective=self.objective,
            reference=self._reference.get((name, split)),
        )
        num_tokens = data.tokens if self._causal else 0
        sums = Sums(text_bytes=data.text_bytes, documents=data.documents, num_tokens=num_tokens)
        start = last = 0.0
        for count, local in enumerate(data.batches(self.rows), 1):
            if should_stop():
                return None
            # Wait for each batch: two batches at once are independent programs, and on CPU processes their collectives
            # could start in different orders and wait for each other forever.
            scored, counts = jax.device_get(self._score(params, self._to_devices(local)))
            numbers = _list_numbers(*counts.pop("numbers")) if "numbers" in counts else []
            counts = {name: count.astype(np.float64) for name, count in counts.items()}
            correct, margin = (None if sum is None else float(sum) for sum in (scored.correct, scored.margin))
            sums.add(
                Sums(
                    float(scored.nats), float(scored.weight), correct=correct, margin=margin, **counts, numbers=numbers
                )
            )
            now = time.monotonic()
            if count == 1:  # includes compilation, so it does not count for the estimate
                start = last = now
            elif now - last > _PROGRESS_SECONDS:
                last = now
                seconds = (now - start) / (count - 1) * (data.num_batches - count)
                text = f"{count}/{data.num_batches} batches, {seconds:.0f} s left"
                logger.info("  evaluating %s/%s: %s", split, name, text, extra={"progress": True})
        if self._causal and sums.num_targets != data.scored:
            raise AssertionError(f"{split}/{name}: scored {sums.num_targets} targets, expected {data.scored}")
        return sums

    def _to_devices(self, local: Batch) -> Batch:
        return hosts.global_batch(self.sharding, local, self.rows, self.batch)


def _count(index: jax.Array, weights: jax.Array, *shape: int) -> jax.Array:
    """Sums of the weights by index: float32 `shape`."""
    return jnp.zeros(shape).reshape(-1).at[index].add(weights).reshape(shape)


def _count_labels(outputs: jax.Array, batch: Batch) -> dict[str, Any]:
    """What `Sums` counts of labels, from the outputs [batch, seq, outputs] of a head for them."""
    classes = outputs.shape[-1]
    if batch.labels is None:
        pairs = batch.targets * classes + jnp.argmax(outputs, axis=-1)
        return {"confusion": _count(pairs, batch.weights, classes, classes)}
    if batch.multi_label:
        pairs = 4 * jnp.arange(classes) + 2 * (batch.labels > 0) + (outputs > 0)
        weights = jnp.broadcast_to(batch.weights[..., None], pairs.shape)
        return {"confusion": _count(pairs, weights, classes, 2, 2)}
    return {"numbers": (outputs[..., 0], batch.labels[..., 0], batch.weights)}


def _count_records(hidden: jax.Array, batch: Batch, objective: ObjectiveConfig) -> dict[str, Any]:
    """What `Sums` counts of records of several texts."""
    is_record = find_records(batch)
    if objective.name == "similarity":
        return {"numbers": (text_cosines(hidden, batch, objective.pooling or "mean"), batch.labels[:, 0, 0], is_record)}
    num_records = jnp.sum(is_record, dtype=jnp.float32)
    if objective.name in PREFERENCES:
        return {"chance": 0.5 * num_records}
    # One of the candidates of `contrastive_loss`.
    return {"chance": num_records / jnp.maximum(num_records * (batch.num_texts - 1), 1)}


def _list_numbers(predicted: np.ndarray, actual: np.ndarray, weights: np.ndarray) -> list[tuple[float, float]]:
    """(prediction, label) at each scored position, in the order of the rows."""
    scored = weights > 0
    return list(zip(predicted[scored].tolist(), actual[scored].tolist(), strict=True))


def _fingerprint_settings(config: RunConfig, manifest: dict[str, Any]) -> str:
    section = run_config.to_json(config)
    data = {name: section["data"][name] for name in ("seq_len", "packing")}
    settings = {"seed": config.seed, "model": section["model"], "objective": section["objective"], "data": data}
    return compute_fingerprint({**settings, "store": manifest["fingerprint"]})


def write(workdir: epath.Path, step: int, scores: dict[str, Any], *, parameters: str, fingerprint: str) -> epath.Path:
    """Write scores to WORKDIR/eval/<step>/<split>.json, with the name of the parameters that were scored."""
    path = workdirs.eval_path(workdir, step, scores["split"])
    if hosts.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        workdirs.write_json(path, {"step": step, "parameters": parameters, "fingerprint": fingerprint, **scores})
    return path


def evaluate(workdir: epath.Path, loaded: Loaded, split: str) -> epath.Path:
    """`llmjax eval`: score a checkpoint on one split, log the scores, and return the file that holds them."""
    manifest = prepare.read_manifest(loaded.store)
    if manifest is None:
        command = next_commands.prepare(workdir, has_sources=bool(loaded.config.data.sources))
        raise UserError(f"{loaded.store}: no token store there; run `{command}` or set --config.data.store")
    logger.info("step %d (%s), %s split, %d device(s)", loaded.step, loaded.params_name, split, jax.device_count())
    reference = read_reference(loaded.config, manifest, workdir) if loaded.objective.name == "dpo" else None
    evaluator = Evaluator(loaded.graph, loaded.config, loaded.objective, loaded.store, manifest, reference)
    scores = evaluator.score_split(loaded.params, split)
    assert scores is not None
    for line in describe(scores):  # before they are written: the disk may be full or read-only
        logger.info("%s", line)
    return write(workdir, loaded.step, scores, parameters=loaded.params_name, fingerprint=loaded.fingerprint)


def describe(scores: dict[str, Any]) -> list[str]:
    """The scores as lines for people: one a source, the total where there are several, a note on a lossy tokenizer."""
    rows = dict(scores["sources"])
    if len(rows) > 1:
        rows["(all)"] = scores["total"]
    lines = [
        f"  {name}: {format_scores(s)} "
        f"({s['num_targets']:,} targets, {s['documents']:,} documents, {s['text_bytes']:,} bytes)"
        for name, s in rows.items()
    ]
    return [*lines, f"  note: {scores['note']}"] if "note" in scores else lines


def format_scores(s: dict[str, Any]) -> str:
    """The scores in one line."""
    if s["perplexity"] is None:
        parts = [f"loss {s['loss']:.4f}"]
    else:
        parts = [f"loss {s['loss']:.4f} nats/token, perplexity {s['perplexity']:.2f}"]
    if s["bits_per_byte"] is not None:
        parts.append(f"{s['bits_per_byte']:.4f} bits per byte, accuracy {s['accuracy']:.1%}")
    elif s["accuracy"] is not None:
        name, baseline = describe_baseline(s)
        parts.append(f"accuracy {s['accuracy']:.1%} ({name}: {baseline:.1%})")
    names = {"margin": "margin", "macro_f1": "macro F1", "pearson": "Pearson", "spearman": "Spearman"}
    return ", ".join([*parts, *(f"{text} {s[name]:.4f}" for name, text in names.items() if name in s)])
