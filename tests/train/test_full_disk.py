"""A disk that is full on one host of a job: all processes end with its line, long before the next save."""

import pathlib
import sys

import pytest

from tests import jobs

# A limit on file size stands for the full disk of process 1: both fail the write itself.
WORKER = """
import os, pathlib, resource, time
from llmjax.checkpoint.manager import Checkpoints
from llmjax.cli import main
from llmjax.data.batches import packing

save, write_plan, begun = Checkpoints.save, packing._write_plan, pathlib.Path(os.environ["BEGUN"])

def fill_disk():
    if os.environ["LLMJAX_PROCESS_ID"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def save_on_full_disk(*arguments):
    fill_disk()
    return save(*arguments)

def write_plan_together(*arguments):
    # The first process to finish a plan spares the other one the work: process 0 waits until process 1 writes its own.
    if os.environ["LLMJAX_PROCESS_ID"] == "1":
        begun.touch()
    while not begun.exists():
        time.sleep(0.01)
    return write_plan(*arguments)

Checkpoints.save = save_on_full_disk
if os.environ["FULL_FROM"] == "the start":
    packing._write_plan = write_plan_together
    fill_disk()
main.main()
"""


def train(tmp_path: pathlib.Path, full_from: str) -> tuple[pathlib.Path, str]:
    """Workdir and output of a job of two processes, of which process 1 has a full disk from then on."""
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus"), tmp_path / "run"
    changes = {"train__steps": 1000000, "data__at_source_end": "repeat", "checkpoint__every": 200}
    _, *arguments = jobs.command("train", workdir, corpus, train__compilation_cache="off", **changes)
    command = jobs.launch([sys.executable, "-c", WORKER, *arguments], 2, 1)
    return workdir, jobs.run(command, status=78, FULL_FROM=full_from, BEGUN=str(tmp_path / "begun"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_failed_save_of_one_process_ends_training_on_all(tmp_path):
    """The first save fails in the background, and the next one would be far later."""
    workdir, printed = train(tmp_path, "the first save")
    message = f"no space left in {workdir / 'checkpoints'} for checkpoint 200 (process 1); there is no complete one yet"
    for process in range(2):
        assert f"[p{process}] llmjax: error: {message}" in printed, printed
    assert "Traceback" not in printed and jobs.metrics(workdir)[-1]["step"] < 400


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_that_fails_alone_tells_the_others(tmp_path):
    """Process 1 cannot write its packing plan, while process 0 waits for it in an exchange."""
    _, printed = train(tmp_path, "the start")
    (error,) = [line for line in printed.splitlines() if line.startswith("[p1] llmjax: error: ")]
    assert "File too large" in error
    reason = error.removeprefix("[p1] llmjax: error: ")
    assert f"[p0] llmjax: watchdog: process 1 ended with exit status 78: {reason}" in printed, printed
    assert "Traceback" not in printed and "most recent call first" not in printed
