"""launch/slurm/train.sbatch without Slurm: stand-ins for srun and scontrol. tests/slurm runs it on a real cluster."""

import subprocess

import pytest

from tests.launch.emulation import SBATCH, FakeSlurm

# The last argument is a shell command: the tasks, with what srun prints of them.
SRUN = '#!/bin/sh\nprintf "%s\\n" "$*" >> "$CALLS/srun"\nfor last; do :; done\neval "$last"\n'


@pytest.fixture
def slurm(tmp_path):
    return FakeSlurm(tmp_path / "slurm", SRUN)


@pytest.mark.parametrize(
    ("tasks", "status", "requeues"),
    [
        ("exit 85", 0, 1),
        ("exit 137", 0, 1),
        ("exit 76", 76, 0),
        ("echo 'srun: error: n1: task 3: Exited with exit code 78' >&2; exit 137", 78, 0),
        ("echo 'srun: error: n1: task 3: Exited with exit code 85' >&2; exit 85", 0, 1),
        ("echo 'a line about exit code 78' >&2; exit 1", 0, 1),
    ],
)
def test_the_exit_statuses_of_tasks_decide_about_a_requeue(slurm, tasks, status, requeues):
    done, printed, count = slurm.run(["llmjax", "train", tasks])
    assert (done, count) == (status, requeues), printed
    if "echo" in tasks:
        assert tasks.split("'")[1] in printed


def test_requeues_end_at_their_limit_in_a_window(slurm):
    for restarts in range(2):
        assert slurm.run(["exit 85"], restarts, MAX_REQUEUES="1", REQUEUE_WINDOW="0")[2] == restarts + 1
    status, printed, count = slurm.run(["exit 85"], 2, MAX_REQUEUES="1")
    assert (status, count) == (85, 2)
    assert "train.sbatch: exit status 85: 1 restarts within 86400 s are the limit" in printed


def test_the_memory_of_restarts_ends_with_the_job(slurm):
    memory = slurm.folder / ".llmjax-restarts-7.json"
    slurm.run(["exit 1"])
    assert memory.exists()
    slurm.run(["exit 0"], 1)
    assert not memory.exists()


def test_srun_gets_the_command_the_whole_nodes_and_the_cpus(slurm):
    command = ["llmjax", "train", "--workdir=gs://bucket/run", "echo cpus $SRUN_CPUS_PER_TASK"]
    _, printed, _ = slurm.run(command, SLURM_CPUS_PER_TASK="6")
    assert "cpus 6" in printed
    assert (slurm.calls / "srun").read_text() == f"--whole --kill-on-bad-exit=1 {' '.join(command)}\n"


def test_a_missing_command_is_refused():
    done = subprocess.run(["bash", SBATCH], capture_output=True, text=True, check=False)
    assert done.returncode == 78 and "the command is missing" in done.stderr


def test_a_script_without_its_checkout_is_refused(slurm, tmp_path):
    scontrol = slurm.folder / "scontrol"
    scontrol.write_text(scontrol.read_text().replace(str(SBATCH), f"{tmp_path}/train.sbatch"))
    status, printed, _ = slurm.run(["exit 0"])
    assert status == 78 and "submit the script of a checkout" in printed
