"""launch/local.py with real processes: environment, exit statuses, signals, restarts."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

LOCAL = pathlib.Path(__file__).resolve().parents[2] / "launch" / "local.py"
INDEX = "import os; index = int(os.environ['LLMJAX_PROCESS_ID']); "


def start(*arguments: str, code: str = "") -> subprocess.Popen:
    command = [sys.executable, str(LOCAL), *arguments]
    if code:
        command += ["--", sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: str, code: str = "") -> tuple[int, str, str]:
    process = start(*arguments, code=code)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_every_process_gets_its_job_variables_and_a_line_prefix():
    names = "('COORDINATOR', 'NUM_PROCESSES', 'PROCESS_ID', 'CPU_DEVICES')"
    code = f"import os; print(*[os.environ['LLMJAX_' + n] for n in {names}], os.environ['JAX_PLATFORMS'])"
    status, out, _ = run("--processes=2", "--devices=4", code=code)
    lines = sorted(out.splitlines())
    assert status == 0
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert re.fullmatch(rf"\[p{index}\] 127\.0\.0\.1:\d+ 2 {index} 4 cpu", line)
    assert lines[0].split()[1] == lines[1].split()[1]


def test_without_devices_the_platform_is_unchanged():
    code = "import os; print(os.environ.get('LLMJAX_CPU_DEVICES'), os.environ['JAX_PLATFORMS'])"
    command = [sys.executable, str(LOCAL), "--processes=1", "--", sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "tpu"}).stdout
    assert out == "[p0] None tpu\n"


@pytest.mark.parametrize("status", [1, 75, 76, 77, 78, 85])
def test_a_failure_decides_the_status_and_ends_the_other_processes(status):
    # Process 0 would run much longer than this test may take, so the launcher must end it.
    code = INDEX + f"import sys, time; time.sleep(9999 if index == 0 else 0); sys.exit({status})"
    job_status, out, _ = run("--processes=2", "--grace=0.3", code=code)
    assert job_status == status
    assert f"process 1 ended with {status}; the other 1 get 0.3 s" in out


def test_after_a_failure_the_others_may_finish_within_the_grace_time():
    code = INDEX + "import sys, time\nif index: sys.exit(3)\ntime.sleep(0.5); print('flushed')"
    status, out, _ = run("--processes=2", "--grace=20", code=code)
    assert status == 3
    assert "[p0] flushed" in out


@pytest.mark.parametrize(
    ("first", "second", "job"), [(134, 78, 78), (134, 143, 143), (75, 77, 77), (85, 75, 85), (134, 1, 134)]
)
def test_the_status_that_says_most_is_that_of_the_job(first, second, job):
    """First those after which no restart helps, then those with a reason, then crashes."""
    code = INDEX + f"import sys, time; time.sleep(0.3 * index); sys.exit({second} if index else {first})"
    assert run("--processes=2", code=code)[0] == job


def test_a_killed_process_counts_as_a_crash():
    status, _, _ = run("--processes=1", code="import os; os.kill(os.getpid(), 9)")
    assert status == 128 + 9


# A second SIGTERM, which the launcher sends when another process has ended, must not print again.
SAVE_ON_SIGTERM = """
import signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("saved", flush=True)
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_process_and_is_not_followed_by_a_restart(number):
    process = start("--processes=2", "--restarts=3", code=SAVE_ON_SIGTERM)
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[0].startswith("[local] no --workdir") and sorted(lines[1:]) == ["[p0] ready\n", "[p1] ready\n"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 85
    name = signal.Signals(number).name
    assert sorted(out.splitlines()) == [
        f"[local] {name}: the processes get 30 s to save and end",
        "[p0] saved",
        "[p1] saved",
    ]


SAVE_SLOWLY = """
import signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: (stop.append(1), print("stop requested", flush=True)))
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
time.sleep(0.5)
print("saved after", len(stop), "signal", flush=True)
sys.exit(85)
"""


def test_further_signals_change_nothing():
    process = start("--processes=1", code=SAVE_SLOWLY)
    assert process.stdout.readline() == "[p0] ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "[local] SIGHUP: the processes get 30 s to save and end\n"
    assert process.stdout.readline() == "[p0] stop requested\n"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (85, "[p0] saved after 1 signal\n")


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_time():
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    process = start("--processes=1", "--grace=0.3", code=code)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + 9


COUNT_STARTS = """
import os, sys
path = os.environ["COUNT"]
with open(path, "a") as file:
    file.write("x")
sys.exit(STATUS if os.path.getsize(path) < GOOD else 0)
"""


@pytest.mark.parametrize(("status", "starts", "end"), [(85, 3, 0), (75, 2, 0), (9, 2, 0), (78, 1, 78)])
def test_restarts_follow_the_exit_status(tmp_path, monkeypatch, status, starts, end):
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    code = COUNT_STARTS.replace("STATUS", str(status)).replace("GOOD", str(starts + (end != 0)))
    job_status, out, _ = run("--processes=1", "--restarts=5", code=code)
    assert (job_status, (tmp_path / "count").read_text()) == (end, "x" * starts)
    assert out.count("starting again in") == (status in (9, 75))  # a pause after a hang and a crash only
    assert out.count("starting again at once") == (2 if status == 85 else 0)
    assert "no --workdir on this machine: restarts without progress are not recognised" in out


def test_no_restart_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    code = COUNT_STARTS.replace("STATUS", "85").replace("GOOD", "9")
    assert run("--processes=1", code=code) == (85, "", "")
    assert (tmp_path / "count").read_text() == "x"


def test_restarts_end_at_their_number_and_without_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    code = COUNT_STARTS.replace("STATUS", "85").replace("GOOD", "9")
    status, out, _ = run("--processes=1", "--restarts=1", code=code)
    assert (status, (tmp_path / "count").read_text()) == (85, "xx")
    assert "exit status 85: 1 restarts within 3600 s are the limit" in out
    command = ["--", sys.executable, "-c", code, "--workdir", str(tmp_path)]
    status, out, _ = run("--processes=1", "--restarts=5", *command)
    assert (status, (tmp_path / "count").read_text()) == (85, "xxxxx")  # a start and two restarts more
    assert "2 restarts in a row wrote no newer checkpoint (there is none)" in out


def test_without_processes_the_environment_describes_the_job(monkeypatch):
    monkeypatch.setenv("LLMJAX_COORDINATOR", "other:1")
    code = "import os; print(os.environ['LLMJAX_COORDINATOR'], os.environ.get('LLMJAX_PROCESS_ID'))"
    assert run(code=code) == (0, "other:1 None\n", "")


def test_llmjax_is_that_of_this_environment_and_not_of_path(tmp_path):
    (tmp_path / "llmjax").write_text("#!/bin/sh\necho another\n")
    (tmp_path / "llmjax").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [sys.executable, str(LOCAL), "--processes=1", "--", "llmjax"]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}).stdout
    assert "[p0] another" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "the command is missing"),
        (["--processes=0", "--", "true"], "'0' is not an integer above 0"),
        (["--processes=1", "--restarts=-1", "--", "false"], "'-1' is not an integer"),
        (["--processes=1", "--grace=soon", "--", "true"], "'soon' is not a number of seconds"),
        (["--processes=1", "--", "no-such-command"], "cannot run no-such-command: No such file or directory"),
    ],
)
def test_bad_flags_are_refused_in_one_line(arguments, message):
    status, _, err = run(*arguments)
    assert status == 78
    assert err.startswith("launch/local.py: error: ") and err.count("\n") == 1 and message in err


def test_help_shows_usage_flags_and_statuses():
    status, out, _ = run("--help")
    assert status == 0
    for word in ("launch/local.py --processes=2 --devices=4 -- llmjax train", "--restarts", "85", "SIGKILL"):
        assert word in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_processes_end_when_their_launcher_is_killed():
    code = (
        "from llmjax.parallel import hosts; hosts.initialize(); import os, time; "
        "print('pid', os.getpid(), flush=True); time.sleep(60)"
    )
    launcher = start("--processes=1", code=code)
    assert launcher.stdout
    pid = int(launcher.stdout.readline().split()[-1])
    launcher.kill()
    launcher.wait()
    stat = pathlib.Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 20
    # A dead process whose new parent has not yet fetched its status is a zombie, state Z.
    while time.monotonic() < deadline and stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
