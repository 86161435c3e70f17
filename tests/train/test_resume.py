"""Which changes of the config a resumed run accepts silently, logs, or refuses."""

import dataclasses
import functools
import logging

import pytest

from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import DataState
from llmjax.errors import UserError
from llmjax.models.recurrent import RecurrentConfig
from llmjax.parallel import axes
from llmjax.run import config as run_config, state as states
from llmjax.run.config import RunConfig, TrainConfig
from llmjax.train import resume
from tests.train.trainer import one_device

MODEL = RecurrentConfig(cell="rglru", vocab_size=64, embed=16, num_layers=1, recurrence="associative")


class Data:
    """Training data that every checkpoint can resume from."""

    def at(self, sample: int) -> DataState:
        return DataState(fingerprint="text", seed=0, mixture="one", next_sample=sample, global_batch=8)

    def check(self, state: DataState) -> None:
        del state


@pytest.fixture(scope="module")
def resume_run(tmp_path_factory):
    """Resume from one checkpoint with another model or training section, and return the log."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = RunConfig(model=MODEL, train=TrainConfig(steps=10))
    mesh = one_device()

    def make_spec(config: RunConfig) -> states.StateSpec:
        with axes.use_mesh(mesh, config.parallel.rules):
            return states.make_state_spec(config.model, config.optimizer, horizon=config.train.steps)

    spec = make_spec(saved)
    checkpoints = Checkpoints(folder)
    meta = {"config": run_config.to_json(saved), "data_state": Data().at(0).to_json(), "tokenizer_sha256": "a"}
    meta |= {"total_targets": 5, "skipped": 0}
    checkpoints.save(1, states.to_checkpoint(states.init_state(spec, MODEL, 0)), meta)
    checkpoints.close()

    def run(caplog, **changes: dict) -> list[str]:
        sections = {name: dataclasses.replace(getattr(saved, name), **fields) for name, fields in changes.items()}
        config = dataclasses.replace(saved, **sections)
        checkpoints = Checkpoints(folder)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="llmjax"):
            progress = resume.restore_or_init(config, make_spec(config), {0: Data()}, checkpoints, "a")  # pyright: ignore[reportArgumentType]
        checkpoints.close()
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
def test_fields_that_do_not_change_the_model_are_accepted_silently(resumed, model):
    (line,) = resumed(model=model)
    assert "resuming at step 1" in line


def test_a_change_of_the_model_is_refused(resumed):
    with pytest.raises(UserError, match=r"model.norm: 'rmsnorm' -> 'layernorm'"):
        resumed(model=dict(norm="layernorm"))


def test_a_change_of_the_loss_is_logged(resumed):
    change, line = resumed(train=dict(z_loss=1e-4, loss_chunk=32))
    assert change.strip() == "changed since the checkpoint: train.z_loss: 0.0 -> 0.0001"
    assert "resuming at step 1" in line


def test_a_change_of_the_batch_is_logged(resumed):
    *changes, line = resumed(train=dict(global_batch=16, batch_schedule=((64, 32),)))
    assert [change.strip() for change in changes] == [
        "changed since the checkpoint: train.global_batch: 8 -> 16",
        "changed since the checkpoint: train.batch_schedule: () -> ((64, 32),)",
    ]
    assert "resuming at step 1" in line


def test_a_change_of_cpu_threads_is_logged(resumed):
    change, line = resumed(parallel=dict(cpu_threads=4))
    assert change.strip() == "changed since the checkpoint: parallel.cpu_threads: 8 -> 4"
    assert "resuming at step 1" in line


def test_moments_of_another_type_are_refused_or_start_at_zero(resumed):
    int8 = dict(moment_dtype="int8")
    with pytest.raises(UserError, match=r"optimizer.moment_dtype: None -> 'int8'"):
        resumed(optimizer=int8)
    change, restart, line = resumed(optimizer=int8, checkpoint=dict(accept_changes=True))
    assert change.strip() == "accepted change: optimizer.moment_dtype: None -> 'int8'"
    assert "the optimizer's state and learning rate start at update 0" in restart and "resuming at step 1" in line


def test_a_checkpoint_of_another_version_is_refused_in_one_line():
    meta = {"config": {"model": {"gated": "gated"}}}
    with pytest.raises(UserError, match=r"the checkpoint's config: .*; another version of llmjax saved it: use that"):
        resume._saved_config(meta)
