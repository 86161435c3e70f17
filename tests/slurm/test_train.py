"""launch/slurm/train.sbatch on a real cluster of two nodes: a killed task, the time limit, statuses of no restart."""

import ast
from concurrent import futures
import os
import pathlib
import re
import signal
import sys
import time

import pytest

from tests import jobs
from tests.slurm.cluster import Cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.skipif(bool(why_not()), reason=why_not())]
SCRIPT = str(jobs.ROOT / "launch" / "slurm" / "train.sbatch")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def wait_until(condition, what, seconds: float = 200):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.1)
    return value


class Submitted:
    """A job of train.sbatch on both nodes."""

    def __init__(self, cluster: Cluster, folder: pathlib.Path, command: list[str], *options: str, **env: str):
        self.cluster, self.log = cluster, folder / "job.log"
        script = ["sbatch", "--parsable", "--nodes=2", f"--output={self.log}", *options, SCRIPT, *command]
        saved = dict(cluster.environment)
        cluster.environment |= {**jobs.environment(), "PATH": saved["PATH"], "SLURM_CONF": saved["SLURM_CONF"], **env}
        self.id = cluster.run(*script).strip()
        cluster.environment = saved

    def wait_for(self, state: str) -> dict[str, str]:
        def fields() -> dict[str, str] | None:
            job = self.cluster.job(self.id)
            assert job["JobState"] in (state, "PENDING", "RUNNING", "COMPLETING"), self.printed()
            return job if job["JobState"] == state else None

        return wait_until(fields, self.printed)

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def start_again(self, count: int, *changes: str) -> None:
        """Wait until the job has been requeued `count` times, and start it soon; Slurm would wait two minutes.

        A start in the second in which the nodes ended the job fails: they have revoked the job's credential.
        """
        wait_until(lambda: self.cluster.job(self.id)["Restarts"] == str(count), self.printed)
        self.wait_for("PENDING")
        wait_until(self.cluster.is_idle, self.printed)
        self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+3seconds", *changes)


# llmjax, which writes the pid of each task, and in the first two starts waits at each step from the sixth on.
WRITE_PID = """
import os, pathlib

pathlib.Path(os.environ["PIDS"], os.environ["SLURM_PROCID"]).write_text(str(os.getpid()))
if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < 2:
    os.environ["SLOW_AFTER"] = "5"
"""


@pytest.mark.timeout(600)
def test_a_killed_task_and_the_time_limit_change_no_bit(cluster, tmp_path):
    """kill -9 of a task, then SIGTERM before the time limit: each is requeued; the run equals an unbroken one."""
    corpus = jobs.write_corpus(tmp_path / "corpus")
    fast = {"XLA_FLAGS": os.environ["XLA_FLAGS"], **jobs.CACHE_ALL_PROGRAMS}
    folders = {"data__store": tmp_path / "store", "train__compilation_cache": tmp_path / "compiled"}
    changes = {"train__steps": 40, "model__num_layers": 1, **folders}
    unbroken, workdir, pids = tmp_path / "unbroken", tmp_path / "run", tmp_path / "pids"
    pids.mkdir()
    arguments = jobs.command("train", workdir, corpus, **changes)[1:]
    job = Submitted(
        cluster,
        tmp_path,
        [sys.executable, "-c", WRITE_PID + jobs.SLOW_TRAINING, *arguments],
        "--signal=TERM@300",
        "--time=60",
        PIDS=str(pids),
        **fast,
    )
    wait_until((workdir / "checkpoints" / "4").exists, job.printed)
    os.kill(int((pids / "1").read_text()), signal.SIGKILL)
    job.start_again(1)

    steps_before = len(jobs.metrics(workdir))
    wait_until(lambda: len(jobs.metrics(workdir)) > steps_before, job.printed)
    # Slurm compares times about every half minute; with this limit the signal is due.
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=5")
    with futures.ThreadPoolExecutor() as pool:  # meanwhile
        command = jobs.launch(jobs.command("train", unbroken, corpus, **changes), 2, 1)
        reference = pool.submit(jobs.run, command, **fast)
        job.start_again(2, "TimeLimit=60")
        job.wait_for("COMPLETED")
        reference.result()
    printed = job.printed()
    assert "job of 2 processes: Slurm step" in printed and "on n[1-2], coordinator n1:" in printed
    assert re.search(r"train.sbatch: exit status (137|143|75|1): requeue", printed), printed
    assert "stop requested: step" in printed and "train.sbatch: exit status 85: requeue" in printed
    assert jobs.trace(workdir) == jobs.trace(unbroken)
    assert jobs.final_fingerprint(workdir, 40) == jobs.final_fingerprint(unbroken, 40)


def test_bad_input_is_not_requeued(cluster, tmp_path):
    """One task ends with 78 and the other one crashes."""
    command = ["sh", "-c", "sleep 0.$SLURM_PROCID; exit $((78 + 56 * SLURM_PROCID))"]
    job = Submitted(cluster, tmp_path, command)
    fields = job.wait_for("FAILED")
    assert (fields["ExitCode"], fields["Restarts"]) == ("78:0", "0"), job.printed()
    assert "train.sbatch: exit status 78: a restart cannot help" in job.printed()


def test_two_restarts_without_a_newer_checkpoint_are_the_last(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, ["sh", "-c", "exit 3", "sh", f"--workdir={tmp_path}"])
    job.start_again(1)
    job.start_again(2)
    job.wait_for("FAILED")
    # The status is 143 where srun ended the other task before that failed by itself.
    statuses = re.findall(
        r"exit status (3|143): (requeue|2 restarts in a row wrote no newer checkpoint)", job.printed()
    )
    assert [decision[:7] for _, decision in statuses] == ["requeue", "requeue", "2 resta"], job.printed()


def test_several_tasks_per_node_form_one_job(cluster):
    code = (
        "from llmjax.parallel import hosts; hosts.initialize(); import jax; "
        "print(jax.process_index(), hosts.exchange('name', str(jax.process_index())))"
    )
    printed = cluster.run("srun", "--nodes=2", "--ntasks=4", sys.executable, "-c", code)
    assert sorted(line for line in printed.splitlines() if line[0].isdigit()) == [
        f"{index} ['0', '1', '2', '3']" for index in range(4)
    ]


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        (["--ntasks-per-node=2", "--gpus-per-node=2"], [["0,1", (0,)], ["0,1", (1,)]]),
        (["--ntasks-per-node=2", "--gpus-per-task=1"], [["0", None], ["1", None]]),
        (["--ntasks-per-node=1", "--gpus-per-node=2"], [["0,1", None]]),
    ],
    ids=["task per GPU", "GPUs per task", "task per node"],
)
def test_the_tasks_of_a_node_take_each_gpu_once(cluster, options, gpus):
    """What Slurm lets a task see, and which of these devices llmjax takes; None: all."""
    code = (
        "import os; from llmjax.parallel.cluster import find_job; e = {**os.environ, 'JAX_PLATFORMS': ''}; "
        "print([e['SLURMD_NODENAME'], e['CUDA_VISIBLE_DEVICES'], find_job(e).local_device_ids])"
    )
    printed = cluster.run("srun", "--nodes=2", *options, sys.executable, "-c", code)
    found = sorted(map(ast.literal_eval, printed.splitlines()), key=str)
    assert found == [[node, *task] for node in ("n1", "n2") for task in gpus]


def test_a_cancelled_job_is_not_requeued(cluster, tmp_path):
    """scancel sends SIGTERM to the tasks, which save and end with 85."""
    started = tmp_path / "started"
    job = Submitted(cluster, tmp_path, ["sh", "-c", f"trap 'exit 85' TERM; touch {started}; sleep 100 & wait"])
    wait_until(started.exists, job.printed)
    cluster.run("scancel", job.id)
    assert job.wait_for("CANCELLED")["Restarts"] == "0"
    wait_until(cluster.is_idle, job.printed)
    fields = cluster.job(job.id)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), job.printed()
