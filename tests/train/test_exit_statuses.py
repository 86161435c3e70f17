"""Training that cannot go on: exit status 76 after a real divergence, 77 after wrong bits on one device."""

import pathlib
import sys

import pytest

from tests import jobs

# The sixth time that the step is computed, one device of process 1 gets a wrong bit in each of its parameters.
WORKER = """
import dataclasses, os
import jax
from llmjax.cli import main
from llmjax.parallel import backends
from tests.faults import flip_a_bit

compile_step = backends.compile_step

def compile_faulty_step(*arguments):
    compiled, steps = compile_step(*arguments), []

    def step(state, batch):
        state, metrics = compiled.step(state, batch)
        steps.append(None)
        if len(steps) == 6 and os.environ["LLMJAX_PROCESS_ID"] == "1":
            device = jax.local_devices()[1].id
            state = dataclasses.replace(state, params=jax.tree.map(lambda x: flip_a_bit(x, device), state.params))
        return state, metrics

    return dataclasses.replace(compiled, step=step)

backends.compile_step = compile_faulty_step
main.main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return jobs.write_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_loss_that_stays_far_above_its_best_ends_the_run(tmp_path, corpus):
    """The learning rate rises until the run diverges."""
    diverging = {
        "train__steps": 400,
        "optimizer__learning_rate": 100.0,
        "optimizer__warmup_steps": 390,
        "optimizer__decay_fraction": 0.01,
    }
    changes = {**diverging, "train__max_skipped": 5, "checkpoint__every": 20, "model__dropout": 0.0}
    arguments = jobs.command("train", tmp_path / "run", corpus, **changes, data__at_source_end="repeat")
    printed = jobs.run(arguments, status=76, LLMJAX_CPU_DEVICES="1")
    assert "diverged: 5 steps in a row" in printed and "train.max_loss_rise=3" in printed, printed
    losses = [line["loss"] for line in jobs.metrics(tmp_path / "run")]
    assert all(loss > min(losses) + 3 for loss in losses[-5:]) and len(losses) < 400


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mesh__data": 4}, "the copies of the training state differ"),  # before the save of step 8
        ({"mesh__fsdp": 4, "train__recompute_every": 5}, "step 5 was computed twice, with different results"),
    ],
    ids=["copies", "recomputed"],
)
def test_a_wrong_bit_on_one_device_ends_the_run_before_it_is_saved(tmp_path, corpus, changes, problem):
    workdir = tmp_path / "run"
    _, *arguments = jobs.command(
        "train", workdir, corpus, **changes, model__num_layers=1, train__compilation_cache="off"
    )
    command = jobs.launch([sys.executable, "-c", WORKER, *arguments], 2, 2)
    printed = jobs.run(command, status=77, PYTHONPATH=str(jobs.ROOT))
    for process in range(2):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"[p{process}] llmjax: error: ")]
        assert f"{problem}: device " in line and line.count(" of process ") == line.count(" of process 1") == 1
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()] == ["4"]
    assert "Traceback" not in printed
