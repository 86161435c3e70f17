"""Signals while training: the first requests to save and stop, further ones change nothing."""

import os
import signal
import subprocess
import sys

import pytest

from llmjax.parallel import interrupts
from llmjax.train.preemption import Preemption
from tests import jobs


@pytest.fixture
def preemption():
    old = {number: signal.signal(number, signal.SIG_DFL) for number in interrupts.SIGNALS}
    preemption = Preemption()
    yield preemption
    preemption.close()
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in old)
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_the_first_signal_requests_a_stop_and_further_ones_change_nothing(preemption, number):
    assert not preemption.reached() and not preemption.agreed
    for _ in range(3):
        os.kill(os.getpid(), number)
        assert preemption.reached() and preemption.agreed


def test_calls_of_reached_are_numbered_until_all_processes_agree(preemption, monkeypatch):
    """The coordination service returns True at one number; from then on the answer stays True."""
    monkeypatch.setattr(preemption, "_is_single", False)
    numbers = []

    def reached_sync_point(number: int) -> bool:
        numbers.append(number)
        return number == 3

    monkeypatch.setattr("llmjax.train.preemption.multihost_utils.reached_preemption_sync_point", reached_sync_point)
    assert [preemption.reached() for _ in range(5)] == [False, False, True, True, True]
    assert numbers == [1, 2, 3]
    preemption._is_single = True


def test_an_ignored_signal_stays_ignored(monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        preemption = Preemption()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not preemption.reached()
        preemption.close()
    finally:
        signal.signal(signal.SIGHUP, old)


SLOW_EVALUATION = """
import sys, time
from llmjax.cli import main
from llmjax.evals import harness

to_devices = harness.Evaluator._to_devices

def wait_before_batch(evaluator, local):
    print("a batch of the evaluation", flush=True)
    time.sleep(0.2)
    return to_devices(evaluator, local)

harness.Evaluator._to_devices = wait_before_batch
main.main()
"""


@pytest.mark.multiprocess
def test_processes_stop_in_the_middle_of_an_evaluation(tmp_path):
    """With 2 rows a batch the evaluation has about a hundred batches; it ends a few batches after the signal."""
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus"), tmp_path / "run"
    changes = {"checkpoint__every": 100, "eval__every": 3, "eval__batch": 2, "data__split__validation": 0.3}
    _, *arguments = jobs.command("train", workdir, corpus, **changes)
    command = jobs.launch([sys.executable, "-c", SLOW_EVALUATION, *arguments], 2, 1)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=jobs.environment()
    ) as job:
        assert job.stdout
        printed = []
        for line in job.stdout:
            printed.append(line)
            if "a batch of the evaluation" in line:
                for _ in range(3):  # only the first one counts
                    job.send_signal(signal.SIGTERM)
                break
        rest = job.stdout.read()
    assert job.returncode == 85, "".join(printed) + rest
    assert "stop requested: step 3 is saved; rerun the same command to resume" in rest
    assert (workdir / "checkpoints" / "3").is_dir() and not (workdir / "eval" / "3").exists()
    assert rest.count("a batch of the evaluation") < 40
