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


def test_every_process_gets_its_place_and_its_lines_are_marked():
    names = "('COORDINATOR', 'NUM_PROCESSES', 'PROCESS_ID', 'CPU_DEVICES')"
    code = f"import os; print(*[os.environ['LLMJAX_' + n] for n in {names}], os.environ['JAX_PLATFORMS'])"
    status, out, _ = run("--processes=2", "--devices=4", code=code)
    lines = sorted(out.splitlines())
    assert status == 0
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert re.fullmatch(rf"\[p{index}\] 127\.0\.0\.1:\d+ 2 {index} 4 cpu", line)
    assert lines[0].split()[1] == lines[1].split()[1]


def test_without_devices_the_platform_is_left_alone():
    code = "import os; print(os.environ.get('LLMJAX_CPU_DEVICES'), os.environ['JAX_PLATFORMS'])"
    command = [sys.executable, str(LOCAL), "--processes=1", "--", sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "tpu"}).stdout
    assert out == "[p0] None tpu\n"


@pytest.mark.parametrize("status", [1, 75, 76, 78, 85])
def test_the_first_failure_is_the_jobs_status_and_ends_the_others(status):
    # Process 0 would outlast this test's limit on the launcher by far: it is ended, not waited for.
    code = INDEX + f"import sys, time; time.sleep(9999 if index == 0 else 0); sys.exit({status})"
    found, out, _ = run("--processes=2", "--grace=0.3", code=code)
    assert found == status
    assert f"process 1 ended with {status}; the other 1 get 0.3 s" in out


def test_others_may_finish_within_the_short_time():
    code = INDEX + "import sys, time\nif index: sys.exit(3)\ntime.sleep(0.5); print('flushed')"
    status, out, _ = run("--processes=2", "--grace=20", code=code)
    assert status == 3
    assert "[p0] flushed" in out


def test_a_known_status_is_kept_though_another_process_crashed_first():
    code = INDEX + "import sys, time; time.sleep(0.3 * index); sys.exit(78 if index else 134)"
    assert run("--processes=2", code=code)[0] == 78


def test_a_killed_process_counts_as_a_crash():
    status, _, _ = run("--processes=1", code="import os; os.kill(os.getpid(), 9)")
    assert status == 128 + 9


POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(85)))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_reaches_every_process(number):
    process = start("--processes=2", "--restarts=3", code=POLITE)
    seen = [process.stdout.readline() for _ in range(2)]
    assert sorted(seen) == ["[p0] ready\n", "[p1] ready\n"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 85  # and no restart: it was the launcher that was asked to stop
    assert sorted(out.splitlines()) == ["[p0] saved", "[p1] saved"]


def test_a_second_request_says_what_is_lost_and_kills():
    process = start("--processes=1", "--grace=50", code=POLITE.replace(", sys.exit(85)", ""))
    assert process.stdout.readline() == "[p0] ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "[p0] saved\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + 9
    assert out == "[local] second signal: killing all processes; steps since the last checkpoint are lost\n"


@pytest.mark.parametrize("status", [129, 143])
def test_stopped_with_nothing_to_save_is_kept_though_another_process_crashed_first(status):
    code = INDEX + f"import sys, time; time.sleep(0.3 * index); sys.exit({status} if index else 134)"
    assert run("--processes=2", code=code)[0] == status


def test_what_ignores_the_request_is_killed_after_the_grace():
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    process = start("--processes=1", "--grace=0.3", code=code)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + 9


COUNTED = """
import os, sys
path = os.environ["COUNT"]
with open(path, "a") as file:
    file.write("x")
sys.exit(STATUS if os.path.getsize(path) < GOOD else 0)
"""


@pytest.mark.parametrize(("status", "starts", "end"), [(85, 3, 0), (9, 2, 0), (78, 1, 78)])
def test_restarts_follow_the_exit_status(tmp_path, monkeypatch, status, starts, end):
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    code = COUNTED.replace("STATUS", str(status)).replace("GOOD", str(starts + (end != 0)))
    found, out, _ = run("--processes=1", "--restarts=5", code=code)
    assert (found, (tmp_path / "count").read_text()) == (end, "x" * starts)
    assert ("starting again in" in out) == (status == 9)  # a pause after a crash only


def test_restarts_are_limited(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    status, _, _ = run("--processes=1", "--restarts=1", code=COUNTED.replace("STATUS", "85").replace("GOOD", "9"))
    assert (status, (tmp_path / "count").read_text()) == (85, "xx")


def test_llmjax_is_the_one_of_this_environment(tmp_path):
    (tmp_path / "llmjax").write_text("#!/bin/sh\necho another\n")
    (tmp_path / "llmjax").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [sys.executable, str(LOCAL), "--processes=1", "--", "llmjax"]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}).stdout
    assert "[p0] another" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "no command given"),
        (["--processes=0", "--", "true"], "'0' is not an integer above 0"),
        (["--processes=1", "--restarts=-1", "--", "false"], "'-1' is not an integer"),
        (["--processes=1", "--grace=soon", "--", "true"], "'soon' is not a number of seconds"),
        (["--processes=1", "--", "no-such-command"], "cannot run no-such-command: No such file or directory"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    status, _, err = run(*arguments)
    assert status == 78
    assert err.startswith("launch/local.py: error: ") and err.count("\n") == 1 and message in err


def test_help_teaches():
    status, out, _ = run("--help")
    assert status == 0
    for word in ("launch/local.py --processes=2 --devices=4 -- llmjax train", "--restarts", "85", "SIGKILL"):
        assert word in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_processes_end_with_a_launcher_that_was_killed():
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
