"""The restart policy: statuses, pauses, the limit of a window, progress."""

import pathlib
import subprocess
import sys

import pytest

# Launchers run as scripts, beside which Python finds restarts.py.
monkey = pytest.MonkeyPatch()
monkey.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[2] / "launch"))
from restarts import Policy, find_workdir, job_status, newest_step

monkey.undo()
SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "restarts.py"


def save(workdir: pathlib.Path, name: str) -> None:
    (workdir / "checkpoints" / name).mkdir(parents=True)


@pytest.mark.parametrize("status", [0, 76, 77, 78])
@pytest.mark.parametrize("preempted", [False, True])
def test_some_statuses_never_restart(status, preempted):
    assert Policy(10, 60).decide(status, 0, None, preempted=preempted)[0] is None


def test_pauses_double_after_crashes_and_hangs_and_not_after_a_stop():
    policy = Policy(100, 1e9)
    pauses = [policy.decide(status, 0, None)[0] for status in (75, 1, 134, 85, 1, 1)]
    assert pauses == [1, 2, 4, 0, 1, 2]
    assert max(policy.decide(1, 0, None)[0] for _ in range(20)) == 60


def test_the_limit_counts_the_restarts_of_a_window():
    policy = Policy(2, 100)
    assert policy.decide(85, 0, None)[0] == 0
    assert policy.decide(85, 50, None)[0] == 0
    assert policy.decide(85, 101, None)[0] == 0  # the first restart is out of the window
    assert policy.decide(85, 120, None) == (None, "exit status 85: 2 restarts within 100 s are the limit")
    assert Policy(0, 100).decide(85, 0, None)[0] is None


def test_two_restarts_in_a_row_without_a_newer_checkpoint_are_the_last():
    policy = Policy(100, 1e9)
    assert policy.decide(1, 0, 4)[0] == 1  # the first start
    assert policy.decide(1, 0, 4)[0] == 2  # a restart without progress
    assert policy.decide(1, 0, 8)[0] == 1  # one with progress: pauses start again, too
    assert policy.decide(1, 0, 8)[0] == 2
    pause, line = policy.decide(85, 0, 8)
    assert pause is None
    assert line.endswith("2 restarts in a row wrote no newer checkpoint (the newest is of step 8)")
    lines = [policy.decide(85, 0, -1)[1] for policy in [Policy(9, 9)] for _ in range(3)]
    assert lines[-1].endswith("2 restarts in a row wrote no newer checkpoint (there is none)")


def test_a_restart_on_other_machines_is_not_counted():
    policy = Policy(1, 100)
    assert [policy.decide(1, 0, -1, preempted=True)[0] for _ in range(9)] == [0] * 9
    assert policy.decide(1, 0, -1)[0] == 1


@pytest.mark.parametrize(
    ("statuses", "status"),
    [([], 0), ([0, 0], 0), ([0, 9], 9), ([134, 1], 134), ([134, 143], 143), ([85, 75], 85), ([1, 75, 78, 76], 78)],
)
def test_the_status_of_a_job_is_the_one_that_says_most(statuses, status):
    assert job_status(statuses) == status


def ask(memory: pathlib.Path, statuses: str, *more: str) -> str:
    flags = [f"--state={memory}", "--limit=9", "--window=100", f"--statuses={statuses}"]
    return subprocess.run([sys.executable, SCRIPT, *flags, *more], check=True, capture_output=True, text=True).stdout


def test_launchers_in_shell_keep_the_memory_in_a_file(tmp_path):
    memory, workdir = tmp_path / "memory", tmp_path / "run"
    memory.touch()  # as mktemp does
    command = ["--", "llmjax", "train", "--workdir", str(workdir)]
    save(workdir, "4")
    assert ask(memory, "0 75", *command) == "75 1 exit status 75: starting again in 1 s (restart 1 of 9)\n"
    assert ask(memory, "75", *command).startswith("75 2 exit status 75: starting again in 2 s")
    save(workdir, "8")
    assert ask(memory, "85", *command).startswith("85 0 exit status 85: starting again at once (restart 3 of 9)")
    assert ask(memory, "1", "--preempted", *command).startswith("1 0 exit status 1: starting again on other machines")
    assert ask(memory, "1", "--newest=9").startswith("1 1 ")
    assert ask(memory, "134 77").startswith("77 - exit status 77: a restart cannot help")


def test_the_newest_step_and_the_workdir_of_a_command(tmp_path):
    assert (newest_step(None), newest_step(tmp_path)) == (None, -1)
    for name in ("0", "20", "100", "damaged", "200.orbax-checkpoint-tmp"):
        save(tmp_path, name)
    assert newest_step(tmp_path) == 100
    assert find_workdir(["llmjax", "train", "--workdir=runs/a", "--config=x"]) == pathlib.Path("runs/a")
    assert find_workdir(["llmjax", "train", "--workdir", "~/a"]) == pathlib.Path.home() / "a"
    assert find_workdir(["llmjax", "train", "--workdir", "gs://b/a"]) is None
    assert find_workdir(["python", "--workdir"]) is None
