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
from llmjax.data.objectives.objective import Objective
from llmjax.data.store import prepare
from llmjax.data.store.token_store import compute_fingerprint
from llmjax.errors import UserError
from llmjax.nn import losses
from llmjax.parallel import backends, hosts
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
    target_counts   [vocab], how often each id was a target; 0 where that is not counted (causal)
    """

    nats: float = 0.0
    num_targets: float = 0.0
    correct: float = 0.0
    text_bytes: int = 0
    documents: int = 0
    target_counts: Any = 0

    def add(self, other: "Sums") -> None:
        """Add the totals of other documents."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def scores(self) -> dict[str, Any]:
        """Totals, and means over the scored targets, JSON-ready.

        loss               nats per target
        bits_per_byte      causal: all nats, first tokens and EOS included, over the original UTF-8 bytes; else None
        accuracy           share of the targets that had the highest probability
        baseline_accuracy  that of always predicting the most frequent target; causal: None
        """
        num_targets = max(self.num_targets, 1)
        loss, causal = self.nats / num_targets, not np.any(self.target_counts)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / max(self.text_bytes, 1) if causal else None,
            "accuracy": self.correct / num_targets,
            "baseline_accuracy": None if causal else float(np.max(self.target_counts)) / num_targets,
            "nats": self.nats,
            "num_targets": int(self.num_targets),
            "text_bytes": self.text_bytes,
            "documents": self.documents,
        }


class Evaluator:
    """Scores parameters on the splits of a store, on the mesh of `use_mesh`; compiles the scoring step once.

    manifest   that of the store
    settings   a fingerprint of everything that a score depends on, except the parameters
    """

    def __init__(
        self, graph: Graph, config: RunConfig, objective: Objective, store: pathlib.Path, manifest: dict[str, Any]
    ):
        self.config, self.objective, self.store, self.manifest = config, objective, store, manifest
        self.batch = config.eval.batch or config.train.global_batch
        self.sharding = backends.batch_sharding()
        backends.check_batch("eval.batch" if config.eval.batch else "train.global_batch", self.batch)
        self.rows = hosts.local_rows(self.sharding, self.batch)
        if objective.min_vocab_size > config.model.vocab_size:
            raise UserError(
                f"objective.name={objective.name!r} needs {objective.min_vocab_size} ids, but "
                f"model.vocab_size={config.model.vocab_size}: evaluate with the objective of training"
            )
        self.settings = _fingerprint_settings(config, manifest)
        self._causal = causal = objective.name == "causal"

        def score(params: Params, batch: Batch) -> tuple[losses.LossSums, Any]:
            model = nnx.merge(graph, params)
            chunk = config.train.loss_chunk
            sums = losses.cross_entropy(
                model(batch).hidden, model.unembed, batch.targets, batch.weights, chunk=chunk, z_loss=0.0
            )
            counts = None if causal else jnp.zeros(config.model.vocab_size).at[batch.targets].add(batch.weights)
            return sums, counts

        self._score = jax.jit(score)

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
            self.store, self.config.data, split=split, source=name, batch=self.batch, objective=self.objective
        )
        sums = Sums(text_bytes=data.text_bytes, documents=data.documents)
        start = last = 0.0
        for count, local in enumerate(data.batches(self.rows), 1):
            if should_stop():
                return None
            # Wait for each batch: two batches at once are independent programs, and on CPU processes their collectives
            # could start in different orders and wait for each other forever.
            scored, counts = jax.device_get(self._score(params, self._to_devices(local)))
            counts = 0 if counts is None else counts.astype(np.float64)
            sums.add(Sums(float(scored.nats), float(scored.weight), float(scored.correct), target_counts=counts))
            now = time.monotonic()
            if count == 1:  # includes compilation, so it does not count for the estimate
                start = last = now
            elif now - last > _PROGRESS_SECONDS:
                last = now
                seconds = (now - start) / (count - 1) * (data.num_batches - count)
                text = f"{count}/{data.num_batches} batches, {seconds:.0f} s left"
                logger.info("  evaluating %s/%s: %s", split, name, text, extra={"progress": True})
        if self._causal and sums.num_targets != data.tokens:
            raise AssertionError(f"{split}/{name}: scored {sums.num_targets} targets of {data.tokens} tokens")
        return sums

    def _to_devices(self, local: Batch) -> Batch:
        return hosts.global_batch(self.sharding, local, self.rows, self.batch)


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
    evaluator = Evaluator(loaded.graph, loaded.config, loaded.objective, loaded.store, manifest)
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
        f"  {name}: loss {s['loss']:.4f} nats/token, perplexity {s['perplexity']:.2f}, {_format_scores(s)} "
        f"({s['num_targets']:,} targets, {s['documents']:,} documents, {s['text_bytes']:,} bytes)"
        for name, s in rows.items()
    ]
    return [*lines, f"  note: {scores['note']}"] if "note" in scores else lines


def _format_scores(s: dict[str, Any]) -> str:
    if s["bits_per_byte"] is not None:
        return f"{s['bits_per_byte']:.4f} bits per byte, accuracy {s['accuracy']:.1%}"
    return f"accuracy {s['accuracy']:.1%} (majority-class baseline: {s['baseline_accuracy']:.1%})"
