"""Small models of random parameters on bytes that tasks are scored with, and the files of tasks."""

from collections.abc import Iterable
import functools
import json
import pathlib
from typing import Any

from etils import epath
import jax

from llmjax.batch import Params
from llmjax.evals.config import TaskConfig, list_scores
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks import run
from llmjax.models import registry
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig
from llmjax.run.loading import Loaded
from tests.serve import runs

CLASSES = ("bad", "fair", "good")


@functools.cache
def make_loaded(objective: str = "causal", scale: float = 1.0, *, multi_label: bool = False) -> Loaded:
    """A decoder, or an encoder with a head for CLASSES or for a number; parameters are multiplied by `scale`."""
    if objective == "causal":
        config, params = runs.make_config(), runs.make_params()
    else:
        data: dict[str, Any] = {"tokenizer": {"kind": "bytes"}, "seq_len": 64}
        data["classes"] = CLASSES if objective == "classify" else ()
        data["multi_label"] = multi_label
        data["sources"] = {"main": {"path": "a.jsonl", "label_field": "label"}}
        tree = {"model": {**runs.MODEL, "family": "encoder"}, "objective": {"name": objective}, "data": data}
        config = run_config.apply_overrides(tree, [])
        config = run_config.with_objective(config, run_config.objective(config, runs.BYTES))
        params = jax.jit(lambda key: registry.init(config.model, key))(jax.random.key(0))
    return wrap(config, jax.tree.map(lambda leaf: leaf * scale, params), fingerprint=f"{objective} {scale}")


def wrap(config: RunConfig, params: Params, *, fingerprint: str = "") -> Loaded:
    """The parameters as a command loads them from a checkpoint of step 0."""
    return Loaded(
        config=config,
        step=0,
        graph=registry.abstract(config.model)[0],
        params=params,
        params_name="parameters",
        tokenizer=runs.BYTES,
        objective=run_config.objective(config, runs.BYTES),
        store=pathlib.Path(),
        fingerprint=fingerprint,
    )


@functools.cache
def make_model(scale: float = 1.0) -> LanguageModel:
    return LanguageModel(make_loaded(scale=scale), 8)


def write_records(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def evaluate(folder: pathlib.Path, loaded: Loaded, task: TaskConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the content of the task's file, its lines), in the mesh of `use_mesh`."""
    scale = 0.0 if loaded.fingerprint == "causal 0.0" else 1.0
    record = run.evaluate(epath.Path(folder), loaded, "mine", task, make_model=lambda: make_model(scale))
    names = {name.partition("/")[0] for name in record["metrics"]}
    known = set(list_scores(task, multi_label=loaded.config.data.multi_label))
    assert not known or known <= names <= known | {"precision", "recall", "f1"}
    lines = (folder / "eval" / "0" / "mine.jsonl").read_text().splitlines()
    return record, [json.loads(line) for line in lines]
