"""A signal ends a command with one line and status 128 + signal, whatever its main thread is doing."""

import signal
import subprocess
import sys

import pytest

PRELUDE = """
import signal, sys, time
from llmjax.cli import main as cli
from llmjax.parallel import interrupts
interrupts._REACTION_SECONDS = 0.2
def command(arguments):
    print("ready", flush=True)
    BODY
cli.COMMANDS["command"] = command
sys.argv = ["llmjax", "command"]
cli.main()
"""
BODIES = {
    "python": "time.sleep(60)",
    # Long C code that lets other threads run but no signal handler, as the compiler does.
    "native code": "import ctypes; libc = ctypes.CDLL(None)\n    while True: libc.usleep(50_000_000)",
    "a destructor": """
    class Slow:
        def __del__(self): time.sleep(60)
    value = Slow()
    del value
    time.sleep(60)""",
}
STOPS = [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP"), (signal.SIGINT, 130, "Ctrl-C")]


def start(body: str, **options) -> subprocess.Popen:
    """A command that runs `body`. By default it does not inherit the signals that this process ignores."""
    options.setdefault("preexec_fn", lambda: [signal.signal(number, signal.SIG_DFL) for number, _, _ in STOPS])
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE.replace("BODY", body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "status", "name"), STOPS)
@pytest.mark.parametrize("body", BODIES)
def test_every_signal_ends_a_command_with_one_line(number, status, name, body):
    process = start(BODIES[body])
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, f"llmjax: stopped by {name}: rerun the same command to resume\n")


def test_a_signal_releases_the_lock_of_the_workdir(tmp_path):
    body = f"""
    from llmjax.run.workdir import Lock
    with Lock({str(tmp_path)!r}, primary=True):
        print("held", flush=True)
        time.sleep(60)"""
    process = start(body)
    assert process.stdout and process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not list(tmp_path.iterdir())


def test_a_signal_that_nohup_ignores_stays_ignored():
    process = start(
        "sys.stdin.readline(); print('done')",
        stdin=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    assert process.communicate("\n", timeout=60)[0] == "done\n" and process.returncode == 0
