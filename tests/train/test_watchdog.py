"""The watchdog in real jobs: a stuck, stopped or dead process is named with its phase, and all processes end."""

import collections
from collections.abc import Iterator
import contextlib
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests import jobs

# The last argument is FAULT:PROCESS. With "data", the thread of that process that assembles batches hangs from step 7
# on: the process is alive, and its heartbeats go on. With "barrier" or "collective", the process evaluates after step
# 7, alone, and waits there for the others on its host or on its device. Each process prints when it knows the limit of
# the steps of the processes that it watches.
WORKER = """
import os, sys, time
from llmjax.cli import main
from llmjax.data.batches.pipeline import TrainData
from llmjax.parallel import hosts
from llmjax.train import loop

fault, _, process = sys.argv.pop().partition(":")
is_faulty = os.environ.get("LLMJAX_PROCESS_ID", "0") == process
assemble, published, is_evaluated = TrainData._assemble, hosts.published, loop._is_evaluated
evaluate = loop._evaluate

def assemble_until_stuck(data, samples):
    if fault == "data" and is_faulty and samples.min() >= 16 * 6:
        time.sleep(9999)
    return assemble(data, samples)

def is_evaluated_here(context, step):
    return is_evaluated(context, step) or (fault in ("barrier", "collective") and is_faulty and step == 7)

def evaluate_alone(context, progress, *rest):
    if progress.step == 7:
        context.watchdog.enter("eval", 7)
        time.sleep(4)  # until process 0 knows
        if fault == "barrier":
            hosts.barrier("evaluation")
    return evaluate(context, progress, *rest)

def print_when_measured(folder):
    texts = published(folder)
    if any("watchdog.step_seconds" in text for text in texts.values()):
        print("a step was measured", flush=True)
    return texts

TrainData._assemble, hosts.published = assemble_until_stuck, print_when_measured
loop._is_evaluated, loop._evaluate = is_evaluated_here, evaluate_alone
main.main()
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A prepared store, a model that compiles fast, and limits of seconds."""
    workdir = tmp_path_factory.mktemp("prepared")
    corpus = jobs.write_corpus(workdir / "corpus")
    jobs.run(jobs.command("prepare", workdir, corpus))
    model = {"model__dropout": 0.0, "model__num_layers": 1, "train__compilation_cache": "off"}
    limits = {"watchdog__data_seconds": 12, "watchdog__step_seconds": 12, "checkpoint__every": 1000000}
    return {"corpus": corpus, "data__store": workdir / "store", **model, **limits}


def worker(workdir: pathlib.Path, settings: dict, *, fault: str = "none", **changes) -> list[str]:
    _, *arguments = jobs.command("train", workdir, **{**settings, **changes})
    return [sys.executable, "-c", WORKER, *arguments, fault]


def lines_of(printed: str, process: int) -> list[str]:
    prefix = f"[p{process}] "
    return [line.removeprefix(prefix) for line in printed.splitlines() if line.startswith(prefix.rstrip())]


def watchdog_lines(printed: list[str]) -> list[str]:
    return [line for line in printed if line.startswith("llmjax: watchdog: ")]


@pytest.mark.multiprocess
def test_a_process_that_waits_for_data_is_named_by_all(tmp_path, settings):
    stuck = 1
    command = worker(tmp_path / "run", settings, fault=f"data:{stuck}")
    printed = jobs.run(jobs.launch(command, 2, 1), status=75)
    for process in range(2):
        own = lines_of(printed, process)
        (line,) = watchdog_lines(own)
        assert f"process {stuck}: phase data of step 7 for " in line and "limit watchdog.data_seconds=12" in line
        assert f"meanwhile process {1 - stuck} in phase step of step" in line
        stacks = "\n".join(own[own.index(line) :])
        assert "in run_steps" in stacks and ("in assemble_until_stuck" in stacks) == (process == stuck)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("wait", ["barrier", "collective"])
def test_processes_that_run_different_code_are_named_with_their_phases(tmp_path, settings, wait):
    """After step 7, process 1 evaluates, and process 0 goes on with step 8: each waits for the other."""
    changes = {"eval__every": 4, "watchdog__eval_seconds": 12}
    command = jobs.launch(worker(tmp_path / "run", settings, fault=f"{wait}:1", **changes), 2, 1)
    job = subprocess.run(command, capture_output=True, text=True, timeout=240, env=jobs.environment(), check=False)
    printed = job.stdout + job.stderr
    # The collective of an evaluation gets the array of a step. If the sizes differ, Gloo aborts process 1, and process
    # 0 says what happened. If they do not, the evaluation finds that its sums cannot be right.
    if wait == "collective" and job.returncode == 1:
        assert (
            "llmjax: watchdog: process 1 ended with exit status 1: AssertionError: validation/main: scored" in printed
        )
        return
    assert job.returncode == 75, printed
    for process in range(2 if wait == "barrier" else 1):
        line, *_ = watchdog_lines(lines_of(printed, process))
        assert "process 1: phase eval of step 7" in line and "process 0 in phase step of step 8" in line, printed


def test_a_single_process_watches_itself(tmp_path, settings):
    command = worker(tmp_path / "run", settings, fault="data:0")
    printed = jobs.run(command, status=75, LLMJAX_CPU_DEVICES="1")
    assert "llmjax: watchdog: process 0: phase data of step 7 for" in printed and "in assemble_until_stuck" in printed


@pytest.mark.slow
def test_time_in_which_a_process_is_suspended_does_not_count(tmp_path, settings):
    """As after Ctrl-Z, for longer than the limits."""
    changes = {"train__steps": 1000000, "data__at_source_end": "repeat"}
    arguments = worker(tmp_path / "run", settings, **changes)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=jobs.environment()
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "loss" in line:
                break
        process.send_signal(signal.SIGSTOP)
        time.sleep(15)
        process.send_signal(signal.SIGCONT)
        for _, line in zip(range(50), process.stdout, strict=False):
            assert "watchdog" not in line
        process.send_signal(signal.SIGTERM)
        printed = process.stdout.read()
    assert process.returncode == 85 and "watchdog" not in printed, printed


class Pair:
    """Two processes of one job, started without a launcher, which would end one when the other ends."""

    def __init__(self, arguments: list[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        variables = {"LLMJAX_COORDINATOR": coordinator, "JAX_COORDINATOR_BIND_ADDRESS": coordinator}
        variables |= {"LLMJAX_NUM_PROCESSES": "2", "LLMJAX_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
        self.lines: dict[int, list[str]] = collections.defaultdict(list)
        self._new: queue.Queue = queue.Queue()
        self.processes = [
            subprocess.Popen(
                arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=jobs.environment(**variables, LLMJAX_PROCESS_ID=str(index)),
            )
            for index in range(2)
        ]
        self._readers = [threading.Thread(target=self._read, args=(index,)) for index in range(2)]
        for reader in self._readers:
            reader.start()

    def _read(self, index: int) -> None:
        stream = self.processes[index].stdout
        assert stream
        for line in stream:
            self.lines[index].append(line.rstrip())
            self._new.put(index)

    def wait_for_line(self, text: str) -> None:
        """Wait until both have printed the text."""
        while not all(any(text in line for line in self.lines[index]) for index in range(2)):
            self._new.get(timeout=200)

    def wait_for_end(self, index: int) -> list[str]:
        """Wait for the end of a process, and return what it printed."""
        self.processes[index].wait(timeout=100)
        self._readers[index].join()
        return self.lines[index]

    def end(self) -> None:
        """Kill the processes that still run."""
        for process in self.processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()


@contextlib.contextmanager
def running_pair(tmp_path: pathlib.Path, settings: dict, **changes) -> Iterator[Pair]:
    """A job of two processes whose watchdogs have measured its steps."""
    endless = {"train__steps": 1000000, "data__at_source_end": "repeat"}
    pair = Pair(worker(tmp_path / "run", settings, **endless, **changes))
    try:
        pair.wait_for_line("a step was measured")
        yield pair
    finally:
        pair.end()


@pytest.mark.multiprocess
@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_process_is_named_by_the_other(tmp_path, settings, stopped):
    with running_pair(tmp_path, settings) as pair:
        pair.processes[stopped].send_signal(signal.SIGSTOP)
        printed = pair.wait_for_end(1 - stopped)
        assert pair.processes[1 - stopped].returncode == 75, printed
    lines = watchdog_lines(printed)
    assert lines, printed
    for line in lines:
        assert f"process {stopped}: phase " in line and "no report for" in line and "dead, stopped or unreach" in line


@pytest.mark.multiprocess
def test_a_process_ends_soon_after_process_0_died(tmp_path, settings):
    """JAX's thread and ours learn of it at the same moment, so that on a busy machine JAX may abort the process first;
    tests/parallel/test_primary_link.py has the rest."""
    with running_pair(tmp_path, settings) as pair:
        pair.processes[0].kill()
        printed = pair.wait_for_end(1)
        status = pair.processes[1].returncode
    if status == -signal.SIGABRT:
        assert any("Terminating process" in line for line in printed), printed
    else:
        line, *_ = watchdog_lines(printed)
        assert status == 75 and "process 0: phase " in line and "its connection closed" in line


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_whose_peer_died_says_so_before_the_error_of_the_library(tmp_path, settings):
    with running_pair(tmp_path, settings) as pair:
        pair.processes[1].kill()
        printed = pair.wait_for_end(0)
        assert pair.processes[0].returncode == 75, printed
    line, *_ = watchdog_lines(printed)
    # Its connection tells process 0 within moments; on a busy machine the lack of reports may do so first.
    assert "process 1: phase " in line and ("its connection closed" in line or "no report for" in line)
    frames = ("Traceback", "stack trace", "Terminating process")
    assert not [other for other in printed[: printed.index(line)] if any(words in other for words in frames)]
