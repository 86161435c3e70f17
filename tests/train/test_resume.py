"""What may change between a checkpoint and the run that goes on from it: without a word, said, or not at all."""

import dataclasses
import functools
import logging

import jax
from jax.sharding import AxisType, Mesh
import numpy as np
import pytest

from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import DataState
from llmjax.errors import UserError
from llmjax.models.recurrent import RecurrentConfig
from llmjax.parallel import axes
from llmjax.run import config as run_config, state as states
from llmjax.run.config import RunConfig, TrainConfig
from llmjax.train import resume

MODEL = RecurrentConfig(cell="rglru", vocab_size=64, embed=16, num_layers=1, recurrence="associative")


class Data:
    """Data that any checkpoint goes on with."""

    def start(self) -> DataState:
        return DataState(fingerprint="text", seed=0, mixture="one", next_sample=0, global_batch=8)

    def check(self, state: DataState) -> None:
        del state


@pytest.fixture(scope="module")
def resume_run(tmp_path_factory):
    """Resume from one checkpoint with another model or training section, and return the log."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = RunConfig(model=MODEL, train=TrainConfig(steps=10))
    mesh = Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )

    def planned(config: RunConfig) -> states.StateSpec:
        with axes.use_mesh(mesh, config.parallel.rules):
            return states.make_state_spec(config.model, config.optimizer, horizon=config.train.steps)

    spec = planned(saved)
    checkpoints = Checkpoints(folder)
    meta = {"config": run_config.to_json(saved), "data_state": Data().start().to_json(), "tokenizer_sha256": "a"}
    meta |= {"total_targets": 5, "skipped": 0}
    checkpoints.save(1, states.to_checkpoint(states.init_state(spec, MODEL, 0)), meta)
    checkpoints.close()

    def run(caplog, model: dict | None = None, train: dict | None = None, parallel: dict | None = None) -> list[str]:
        config = dataclasses.replace(
            saved,
            model=dataclasses.replace(saved.model, **model or {}),
            train=dataclasses.replace(saved.train, **train or {}),
            parallel=dataclasses.replace(saved.parallel, **parallel or {}),
        )
        again = Checkpoints(folder)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="llmjax"):
            progress = resume.restore_or_init(config, planned(config), Data(), again, "a")  # pyright: ignore[reportArgumentType]
        again.close()
        assert (progress.step, progress.total_targets) == (1, 5)
        return list(caplog.messages)

    return run


@pytest.fixture
def resumed(resume_run, caplog):
    return functools.partial(resume_run, caplog)


@pytest.mark.parametrize(
    "model",
    [
        dict(recurrence="sequential", unroll=4),
        dict(scan=False, remat="full", dropout=0.1, dtype="bfloat16"),
    ],
    ids=", ".join,
)
def test_how_a_model_computes_may_change_without_a_word(resumed, model):
    (line,) = resumed(model=model)
    assert "resuming at step 1" in line


def test_what_a_model_is_may_not_change(resumed):
    with pytest.raises(UserError, match=r"model.norm: 'rmsnorm' -> 'layernorm'"):
        resumed(model=dict(norm="layernorm"))


def test_what_training_lowers_is_said_when_it_changes(resumed):
    changed, line = resumed(train=dict(z_loss=1e-4, loss_chunk=32))
    assert changed.strip() == "changed since the checkpoint: train.z_loss: 0.0 -> 0.0001"
    assert "resuming at step 1" in line


def test_another_number_of_cpu_threads_is_said(resumed):
    changed, line = resumed(parallel=dict(cpu_threads=4))
    assert changed.strip() == "changed since the checkpoint: parallel.cpu_threads: 8 -> 4"
    assert "resuming at step 1" in line


def test_a_checkpoint_of_another_version_is_refused_in_one_line():
    meta = {"config": {"model": {"gated": "gated"}}}
    with pytest.raises(UserError, match=r"the checkpoint's config: .*; another version of llmjax saved it: use that"):
        resume._saved_config(meta)
