"""`train.profile` writes a trace of the steps of its window that a process runs; bad values are refused."""

import logging

from etils import epath
import jax
import jax.numpy as jnp
import pytest

from llmjax.errors import UserError
from llmjax.report.profile import read_profile
from llmjax.run.config import RunConfig, TrainConfig
from llmjax.train.profiling import Profiler, check_profile

PROGRAM = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.sin(y @ y), x))


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level(logging.INFO, logger="llmjax")


def run(workdir, profile: tuple, steps: range) -> None:
    """A loop over `steps` that runs one program a step."""
    profiler = Profiler(TrainConfig(profile=profile), epath.Path(workdir), steps.start)
    state = jax.block_until_ready(PROGRAM(jnp.ones((64, 64))))
    for step in steps:
        profiler.before_step(step, state)
        state = PROGRAM(state)
        profiler.after_step(step, state)
    jax.block_until_ready(state)
    profiler.close()


@pytest.mark.parametrize(
    "profile, steps, traced",
    [
        ((2, 3), range(1, 8), (2, 4)),
        ((2, 3), range(3, 8), (3, 4)),  # resumed inside the window
        ((2, 3), range(1, 4), (2, 3)),  # ended inside the window
        ((), range(1, 4), None),
        ((5, 1), range(1, 4), None),  # ended before the window
    ],
)
def test_the_steps_of_the_window_are_traced(tmp_path, profile, steps, traced, caplog):
    run(tmp_path, profile, steps)
    profile_read = read_profile(epath.Path(tmp_path))
    if traced is None:
        assert not caplog.messages and profile_read is None
        return
    (line,) = caplog.messages
    assert line.startswith(f"profile of steps {traced[0]} to {traced[1]}: {profile_read.path.parent}")
    assert "ui.perfetto.dev" in line
    assert profile_read.operations and profile_read.seconds > 0


def test_a_window_before_the_resumed_step_is_logged(tmp_path, caplog):
    run(tmp_path, (2, 3), range(5, 8))
    assert caplog.messages == ["train.profile=(2, 3): these steps are done, so no trace is written"]


def test_only_the_primary_process_traces(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("llmjax.parallel.hosts.is_primary", lambda: False)
    run(tmp_path, (2, 3), range(1, 8))
    assert not caplog.messages and not list(tmp_path.iterdir())


def test_training_continues_when_the_trace_cannot_be_written(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    run(tmp_path, (1, 2), range(1, 4))
    (line,) = caplog.messages
    assert line.startswith("no profile of steps 1 to 2: ") and "training continues" in line


@pytest.mark.parametrize(
    "value", [(1,), (1, 2, 3), (0, 5), (5, 0), (-1, 3), (1.0, 2), ("1", 2), (True, 2), ((1, 2), 3)]
)
def test_a_malformed_window_is_refused(value):
    with pytest.raises(UserError, match=r"^train\.profile=.*: expected \(first step, number of steps\)"):
        RunConfig(train=TrainConfig(profile=value))


def test_a_window_beyond_the_last_step_is_refused():
    assert RunConfig(train=TrainConfig(steps=10, profile=(8, 3))).train.profile == (8, 3)
    with pytest.raises(UserError, match=r"ends at step 11, beyond train\.steps=10"):
        RunConfig(train=TrainConfig(steps=10, profile=(8, 4)))


def test_a_workdir_in_an_object_store_is_refused():
    with pytest.raises(UserError, match="gs://bucket/run"):
        check_profile(TrainConfig(profile=(1, 1)), epath.Path("gs://bucket/run"))
