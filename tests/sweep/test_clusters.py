"""A sweep whose processes are tasks of a cluster: a Slurm array, and the Ray program of docs/sweep.md."""

import re
import sys
import time

import pytest

from tests import jobs
from tests.cli.test_sweep import OVER, arguments
from tests.slurm.cluster import Cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture
def command(tmp_path):
    """`llmjax sweep` of two values, and its workdir."""
    corpus = jobs.write_corpus(tmp_path / "corpus", 20)
    workdir = tmp_path / "sweep"
    return [str(jobs.LLMJAX), *arguments(workdir, corpus, OVER, "--sampler=grid")], workdir


def check_finished(workdir) -> None:
    """Each value was trained once, by one of the processes."""
    printed = jobs.run([str(jobs.LLMJAX), "sweep", f"--workdir={workdir}"])
    assert "--config.optimizer.learning_rate=0.01\n" in printed
    assert sorted(path.name for path in (workdir / "trials").iterdir()) == ["000", "001"]
    for trial in ("000", "001"):
        assert [line["step"] for line in jobs.metrics(workdir / "trials" / trial)] == [2, 4]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_the_tasks_of_a_slurm_array_share_the_trials(command, tmp_path):
    words, workdir = command
    folder = tmp_path / "slurm"
    folder.mkdir()
    with Cluster(folder) as cluster:
        script = tmp_path / "sweep.sbatch"
        script.write_text("#!/bin/sh\nexec " + " ".join(f"'{word}'" for word in words) + "\n")
        saved = dict(cluster.environment)
        cluster.environment |= {**jobs.environment(), "PATH": saved["PATH"], "SLURM_CONF": saved["SLURM_CONF"]}
        submitted = ["sbatch", "--parsable", "--array=0-1", f"--output={tmp_path}/task-%a.log", str(script)]
        job = cluster.run(*submitted).strip()
        deadline = time.monotonic() + 240
        while True:
            states = re.findall(r"JobState=(\w+)", cluster.run("scontrol", "show", "job", job))
            if states and set(states) <= {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}:
                break
            assert time.monotonic() < deadline, states
            time.sleep(0.5)
        printed = [(tmp_path / f"task-{task}.log").read_text() for task in (0, 1)]
        assert states == ["COMPLETED", "COMPLETED"], printed
    check_finished(workdir)


def test_ray_runs_the_program_of_the_docs(command, tmp_path):
    pytest.importorskip("ray")
    words, workdir = command
    (program,) = re.findall(
        r"```python\n(import subprocess.*?)```", (jobs.ROOT / "docs" / "sweep.md").read_text(), re.S
    )
    (tmp_path / "join.py").write_text(program)
    jobs.run([sys.executable, str(tmp_path / "join.py"), "2", *words], HOME=str(tmp_path))
    check_finished(workdir)
