"""Evaluation: score every example of a split exactly once, on any mesh."""

from collections.abc import Callable, Sequence
import dataclasses
import math
import pathlib
import time
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.pipeline import EvalData
from llmjax.data.store import prepare
from llmjax.data.store.token_store import fingerprint_of
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.nn import losses
from llmjax.parallel import axes, backends as backends, hosts
from llmjax.run import config as run_config, loading, workdir as workdirs
from llmjax.run.config import RunConfig


@dataclasses.dataclass
class Sums:
    """Exact totals of a split, float64 on the host, so that they depend on no batch size and no mesh.

    targets  how often each id was to be predicted; 0 where that is not counted (causal)
    """

    nats: float = 0.0
    tokens: float = 0.0
    correct: float = 0.0
    text_bytes: int = 0
    documents: int = 0
    targets: Any = 0

    def add(self, other: "Sums") -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def scores(self) -> dict[str, Any]:
        """loss: nats a scored token, of which accuracy is the share that had the highest probability.

        bits_per_byte      causal: all nats, first tokens and EOS included, over the original UTF-8 bytes; else None
        baseline_accuracy  else: the accuracy of always guessing the most frequent target; causal: None
        """
        loss, causal = self.nats / max(self.tokens, 1), not np.any(self.targets)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / max(self.text_bytes, 1) if causal else None,
            "accuracy": self.correct / max(self.tokens, 1),
            "baseline_accuracy": None if causal else float(np.max(self.targets)) / max(self.tokens, 1),
            "nats": self.nats,
            "tokens": int(self.tokens),
            "text_bytes": self.text_bytes,
            "documents": self.documents,
        }


class Evaluator:
    """Scores parameters on the splits of a store; the compiled step is kept between calls."""

    def __init__(self, graph: Any, config: RunConfig, mesh: Mesh, store: pathlib.Path):
        self.config, self.mesh, self.store = config, mesh, store
        self.batch = config.eval.batch or config.train.global_batch
        self.sharding = backends.batch_sharding(mesh)
        backends.check_batch("eval.batch" if config.eval.batch else "train.global_batch", self.batch, mesh)
        self.rows = hosts.local_rows(self.sharding, self.batch)
        self.objective = run_config.objective(config, load_tokenizer(store))
        if self.objective.min_vocab_size > config.model.vocab_size:
            raise UserError(
                f"objective.name={self.objective.name!r} needs {self.objective.min_vocab_size} ids, but "
                f"model.vocab_size={config.model.vocab_size}: evaluate with the objective of training"
            )
        self.settings = _settings(config, store)
        self._causal = causal = self.objective.name == "causal"

        def score(params: dict, batch: Batch) -> tuple[losses.LossSums, Any]:
            model = nnx.merge(graph, params)
            chunk = config.train.loss_chunk
            sums = losses.cross_entropy(
                model(batch).hidden, model.unembed, batch.targets, batch.weights, chunk=chunk, z_loss=0.0
            )
            counts = None if causal else jnp.zeros(config.model.vocab_size).at[batch.targets].add(batch.weights)
            return sums, counts

        self._score = jax.jit(score)

    def split(self, params: dict, split: str, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Scores of a split, in all and by source: {"split", "settings", "total": {...}, "sources": {name: {...}}}."""
        manifest = prepare.read_manifest(self.store)
        assert manifest is not None
        total, sources = Sums(), {}
        for name, source in manifest["sources"].items():
            if not source[split]["tokens"]:
                continue
            sums = self._source(params, name, split, say)
            sources[name] = sums.scores()
            total.add(sums)
        if not sources:
            raise UserError(
                f"--split={split}: that split of {self.store} is empty; raise data.split.{split} and prepare again"
            )
        scores = {"split": split, "settings": self.settings, "total": total.scores(), "sources": sources}
        if self._causal and not manifest["tokenizer"]["lossless"]:
            scores["note"] = "the tokenizer loses text, so bits per byte are of what it keeps over the original bytes"
        return scores

    def _source(self, params: dict, name: str, split: str, say: Callable[[str], None]) -> Sums:
        data = EvalData(
            self.store, self.config.data, split=split, source=name, batch=self.batch, objective=self.objective
        )
        sums = Sums(text_bytes=data.text_bytes, documents=data.documents)
        began = last = time.monotonic()
        with jax.set_mesh(self.mesh), axes.use_rules(self.config.parallel.rules):
            for done, local in enumerate(data.batches(self.rows), 1):
                # Each batch is waited for: two at once do not depend on each other, and on CPU processes their
                # collectives could start in different orders and wait for each other for ever.
                scored, counts = jax.device_get(self._score(params, self._place(local)))
                targets = 0 if counts is None else counts.astype(np.float64)
                sums.add(Sums(float(scored.nats), float(scored.weight), float(scored.correct), targets=targets))
                if time.monotonic() - last > 5:
                    last = time.monotonic()
                    left = (last - began) / done * (data.num_batches - done)
                    say(f"  evaluating {split}/{name}: {done}/{data.num_batches} batches, {left:.0f} s left")
        if self._causal and sums.tokens != data.tokens:
            raise AssertionError(f"{split}/{name}: scored {sums.tokens} tokens of {data.tokens}")
        return sums

    def _place(self, local: Batch) -> Batch:
        return hosts.global_batch(self.sharding, local, self.rows, self.batch)


def _settings(config: RunConfig, store: pathlib.Path) -> str:
    """A fingerprint of what a score depends on beside the parameters, which may be scored in many ways."""
    manifest, told = prepare.read_manifest(store), run_config.to_json(config)
    assert manifest is not None
    data = {name: told["data"][name] for name in ("seq_len", "packing")}
    asked = {"seed": config.seed, "model": told["model"], "objective": told["objective"], "data": data}
    return fingerprint_of({**asked, "store": manifest["fingerprint"]})


def write(workdir: epath.Path, step: int, scores: dict[str, Any], *, parameters: str, fingerprint: str) -> epath.Path:
    """Put scores at WORKDIR/eval/<step>/<split>.json, with the name of the parameters that were scored."""
    path = workdir / "eval" / str(step) / f"{scores['split']}.json"
    if hosts.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        workdirs.write_json(path, {"step": step, "parameters": parameters, "fingerprint": fingerprint, **scores})
    return path


def evaluate(
    workdir: epath.Path,
    *,
    step: int | None,
    split: str,
    overrides: Sequence[tuple[str, str]] = (),
    say: Callable[[str], None] = print,
) -> tuple[epath.Path, dict[str, Any]]:
    """`llmjax eval`: score a checkpoint on one split. Returns the file written and the scores."""
    loaded = loading.load(workdir, step=step, overrides=overrides, say=say)
    say(f"step {loaded.step} ({loaded.parameters}), {split} split, {jax.device_count()} device(s)")
    scores = Evaluator(loaded.graph, loaded.config, loaded.mesh, loaded.store).split(loaded.params, split, say)
    for line in describe(scores):  # before they are written: the disk may be full or read-only
        say(line)
    path = write(workdir, loaded.step, scores, parameters=loaded.parameters, fingerprint=loaded.fingerprint)
    return path, scores


def describe(scores: dict[str, Any]) -> list[str]:
    """The scores as lines for people: one a source, the total where there are several, a note on a lossy tokenizer."""
    rows = dict(scores["sources"])
    if len(rows) > 1:
        rows["(all)"] = scores["total"]
    lines = [
        f"  {name}: loss {s['loss']:.4f} nats/token, perplexity {s['perplexity']:.2f}, {_told(s)} "
        f"({s['tokens']:,} tokens, {s['documents']:,} documents, {s['text_bytes']:,} bytes)"
        for name, s in rows.items()
    ]
    return [*lines, f"  note: {scores['note']}"] if "note" in scores else lines


def _told(s: dict[str, Any]) -> str:
    if s["bits_per_byte"] is not None:
        return f"{s['bits_per_byte']:.4f} bits per byte, accuracy {s['accuracy']:.1%}"
    return f"accuracy {s['accuracy']:.1%} (majority-class baseline: {s['baseline_accuracy']:.1%})"
