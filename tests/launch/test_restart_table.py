"""One table of restarts for local.py, train.sbatch and tpu.sh: each starts the same job again, and ends it alike."""

from collections.abc import Callable
import pathlib
import subprocess
import sys

import pytest

from tests import jobs
from tests.launch.emulation import FakeCloud, FakeSlurm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the hosts are Linux machines, with flock and setsid")

# A process of the job. At its n-th start it saves the checkpoint that SAVES names for it, as llmjax does, and exits
# with its status in STATUSES: "85 134,78" means that both processes end with 85, and then one with 134, one with 78.
PROCESS = """
import os, pathlib, sys, time
index, folder, saves, statuses = int(os.environ["LLMJAX_PROCESS_ID"]), pathlib.Path(sys.argv[1]), *sys.argv[2:4]
count = folder / f"starts-{index}"
with count.open("a") as file:
    file.write("x")
start = len(count.read_text()) - 1
time.sleep(0.2 * index)
step = saves.split()[start] if start < len(saves.split()) else "-"
if step != "-" and index == 0:
    (folder / "run" / "checkpoints" / step).mkdir(parents=True)
    print(f"stop requested: step {step} is saved; rerun the same command to resume", flush=True)
own = statuses.split()[start].split(",")
sys.exit(int(own[index % len(own)]))
"""


def job(folder: pathlib.Path, saves: str, statuses: str) -> list[str]:
    return [sys.executable, "-c", PROCESS, str(folder), saves, statuses, "--workdir", str(folder / "run")]


def by_local(folder: pathlib.Path, command: list[str], limit: int) -> tuple[int, str]:
    launcher = [sys.executable, str(jobs.ROOT / "launch" / "local.py"), "--processes=2", f"--restarts={limit}"]
    done = subprocess.run([*launcher, "--", *command], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def by_slurm(folder: pathlib.Path, command: list[str], limit: int) -> tuple[int, str]:
    slurm, restarts = FakeSlurm(folder / "slurm"), 0
    while True:
        status, printed, requeues = slurm.run(command, restarts, MAX_REQUEUES=str(limit))
        if requeues == restarts:
            return status, printed
        restarts = requeues


def by_tpu_vm(folder: pathlib.Path, command: list[str], limit: int) -> tuple[int, str]:
    cloud = FakeCloud(folder / "cloud")
    cloud.set_state("a", "ACTIVE")
    try:
        return cloud.run("babysit", "--name=a", "--zone=z", "--type=v6e-8", f"--restarts={limit}", "--", *command)
    finally:
        cloud.end_jobs()


@pytest.mark.parametrize("launch", [by_local, by_slurm, by_tpu_vm])
@pytest.mark.parametrize(
    ("saves", "statuses", "limit", "starts", "end", "reason"),
    [
        ("", "0", 9, 1, 0, ""),
        ("", "78,76", 9, 1, 78, "exit status 78: a restart cannot help"),
        ("", "75,77", 9, 1, 77, "exit status 77: a restart cannot help"),
        ("4 8", "85 75,85 76", 9, 3, 76, "exit status 76: a restart cannot help"),
        ("4 8", "134,1 0,9 0", 9, 3, 0, ""),
        ("4 8 12", "85 85 85 85", 2, 3, 85, "exit status 85: 2 restarts within"),
        ("", "85 85 85 85", 9, 3, 85, "2 restarts in a row wrote no newer checkpoint (there is none)"),
        ("4 - 8", "85 85 85 85 85 85", 9, 5, 85, "wrote no newer checkpoint (the newest is of step 8)"),
    ],
)
def test_launchers_restart_alike(tmp_path, launch: Callable, saves, statuses, limit, starts, end, reason):
    (tmp_path / "run").mkdir()
    status, printed = launch(tmp_path, job(tmp_path, saves, statuses), limit)
    assert (status, len((tmp_path / "starts-0").read_text())) == (end, starts), printed
    assert reason in printed
