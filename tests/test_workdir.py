"""The workdir's lock and its small files."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from llmjax import workdir
from llmjax.config import UserError
from llmjax.workdir import Lock, read_json, write_json

HOLD = """
import sys, time
from llmjax.workdir import Lock
with Lock(sys.argv[1], primary=True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def foreign(tmp_path, **changes):
    """Leaves the lock of a run on another host."""
    now = time.time()
    lock = {"run": "r", "host": "elsewhere", "pid": 7, "born": "", "started": now, "refreshed": now, **changes}
    write_json(tmp_path / "lock.json", lock)
    return lock


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(workdir, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(workdir, "EXPIRY_SECONDS", 0.6)


def test_a_workdir_in_use_is_refused_naming_the_process(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on {socket.gethostname()}") as error:
        Lock(tmp_path, primary=True).__enter__()
    assert "\n" not in str(error.value)


def test_a_killed_run_is_succeeded_at_once(tmp_path, holder, monkeypatch):
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it ended, and stays a zombie
    monkeypatch.setattr(workdir, "EXPIRY_SECONDS", 9999)  # waiting for that would end this test
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["pid"] == os.getpid()


def test_a_number_used_again_by_another_process_is_not_the_holder(tmp_path):
    foreign(tmp_path, host=socket.gethostname(), pid=os.getpid(), born="another boot 12")
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["run"] != "r"


def test_the_lock_is_released_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with Lock(tmp_path, primary=True):
            assert (tmp_path / "lock.json").exists()
        assert not (tmp_path / "lock.json").exists()


def test_an_exception_releases_the_lock(tmp_path):
    with pytest.raises(RuntimeError), Lock(tmp_path, primary=True):
        raise RuntimeError
    assert not (tmp_path / "lock.json").exists()


def test_other_processes_of_the_job_do_not_lock(tmp_path, holder):
    before = (tmp_path / "lock.json").read_text()
    with Lock(tmp_path, primary=False):
        assert (tmp_path / "lock.json").read_text() == before
    assert (tmp_path / "lock.json").read_text() == before


def test_a_run_on_another_host_that_refreshes_is_refused(tmp_path, fast):
    lock, stop = foreign(tmp_path), threading.Event()

    def refresh():
        while not stop.wait(0.02):
            foreign(tmp_path, started=lock["started"])

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            Lock(tmp_path, primary=True).__enter__()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("ahead", [-1e9, 0.0, 1e9])
def test_a_silent_lock_of_another_host_expires_whatever_its_clock_says(tmp_path, fast, ahead):
    foreign(tmp_path, refreshed=time.time() + ahead)
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["pid"] == os.getpid()


def test_the_holder_refreshes(tmp_path, fast):
    with Lock(tmp_path, primary=True):
        first = read_json(tmp_path / "lock.json")["refreshed"]
        deadline = time.monotonic() + 10
        while read_json(tmp_path / "lock.json")["refreshed"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_run_whose_lock_was_taken_over_ends_with_78(tmp_path):
    code = f"import llmjax.workdir as w; w.REFRESH_SECONDS = 0.1\n{HOLD}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    foreign(tmp_path)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 78
    assert "was taken over" in errors


def test_a_torn_lock_file_holds_nothing(tmp_path):
    (tmp_path / "lock.json").write_text('{"run": ')
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["pid"] == os.getpid()


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, "ü"]})
    assert read_json(path) == {"a": [1, 2.5, "ü"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": [1, 2.5, "ü"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_that_is_missing_or_broken(tmp_path):
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not JSON"):
        read_json(tmp_path / "bad.json")
