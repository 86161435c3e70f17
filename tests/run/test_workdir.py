"""The lock of a workdir, and its JSON files."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from llmjax.errors import UserError
from llmjax.run import workdir
from llmjax.run.workdir import Lock, read_json, write_json

HOLD_LOCK = """
import sys, time
from llmjax.run.workdir import Lock
with Lock(sys.argv[1], primary=True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write_foreign_lock(tmp_path, **changes):
    """Write the lock of a run on another host, and return its content."""
    now = time.time()
    lock = {"run": "r", "host": "elsewhere", "pid": 7, "born": "", "started": now, "refreshed": now, **changes}
    write_json(tmp_path / "lock.json", lock)
    return lock


@pytest.fixture
def short_intervals(monkeypatch):
    monkeypatch.setattr(workdir, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(workdir, "EXPIRY_SECONDS", 0.6)


def test_a_workdir_in_use_is_refused_with_the_process_and_host(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on {socket.gethostname()}") as error:
        Lock(tmp_path, primary=True).__enter__()
    assert "\n" not in str(error.value)


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder, monkeypatch):
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it ended, and stays a zombie
    monkeypatch.setattr(workdir, "EXPIRY_SECONDS", 9999)  # waiting for that would end this test
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["pid"] == os.getpid()


def test_a_process_that_reuses_the_id_is_not_the_holder(tmp_path):
    write_foreign_lock(tmp_path, host=socket.gethostname(), machine=workdir._machine_id(), pid=os.getpid(), born="12")
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["run"] != "r"


def test_a_released_lock_can_be_taken_again(tmp_path):
    for _ in range(2):
        with Lock(tmp_path, primary=True):
            assert (tmp_path / "lock.json").exists()
        assert not (tmp_path / "lock.json").exists()


def test_an_exception_releases_the_lock(tmp_path):
    with pytest.raises(RuntimeError), Lock(tmp_path, primary=True):
        raise RuntimeError
    assert not (tmp_path / "lock.json").exists()


def test_only_the_primary_process_takes_the_lock(tmp_path, holder):
    before = (tmp_path / "lock.json").read_text()
    with Lock(tmp_path, primary=False):
        assert (tmp_path / "lock.json").read_text() == before
    assert (tmp_path / "lock.json").read_text() == before


def test_a_lock_that_another_host_refreshes_is_respected(tmp_path, short_intervals):
    lock, stop = write_foreign_lock(tmp_path), threading.Event()

    def refresh():
        while not stop.wait(0.02):
            write_foreign_lock(tmp_path, started=lock["started"])

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            Lock(tmp_path, primary=True).__enter__()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("clock_error", [-1e9, 0.0, 1e9])
def test_an_unrefreshed_lock_of_another_host_expires_whatever_its_clock_shows(tmp_path, short_intervals, clock_error):
    write_foreign_lock(tmp_path, refreshed=time.time() + clock_error)
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["pid"] == os.getpid()


def test_the_holder_refreshes_its_lock(tmp_path, short_intervals):
    with Lock(tmp_path, primary=True):
        first = read_json(tmp_path / "lock.json")["refreshed"]
        deadline = time.monotonic() + 10
        while read_json(tmp_path / "lock.json")["refreshed"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_run_whose_lock_was_taken_over_ends_with_78(tmp_path):
    code = f"import llmjax.run.workdir as w; w.REFRESH_SECONDS = 0.1\n{HOLD_LOCK}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    write_foreign_lock(tmp_path)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 78
    assert "was taken over" in errors


@pytest.mark.parametrize("machine", ["another boot", "another boot pid:[1]", ""])
def test_a_lock_of_another_machine_with_the_same_host_name_is_not_taken_over_at_once(
    tmp_path, short_intervals, monkeypatch, machine
):
    """Two containers may share a host name and even the ids of their processes."""
    lock = write_foreign_lock(tmp_path, host=socket.gethostname(), machine=machine, pid=os.getpid(), born="12")
    contents = []  # of the lock, at every wait
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: contents.append(read_json(tmp_path / "lock.json")))
    with Lock(tmp_path, primary=True):
        assert lock in contents
        assert read_json(tmp_path / "lock.json")["run"] != "r"


def test_two_namespaces_of_process_ids_are_two_machines(tmp_path):
    """A process in another container cannot find the holder's id, and must not conclude that the holder died."""
    in_namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*in_namespace, "true"], capture_output=True).returncode:
        pytest.skip("this system cannot create a namespace of process ids")
    hold = HOLD_LOCK.replace("time\n", "time; import llmjax.run.workdir as w; w.REFRESH_SECONDS = 0.2\n", 1)
    wait = hold.replace("w.REFRESH", "w.EXPIRY_SECONDS = 9999; w.REFRESH")
    first = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        command = [*in_namespace, sys.executable, "-c", wait, str(tmp_path)]
        second = subprocess.run(command, capture_output=True, text=True)
        assert f"in use by process {first.pid}" in second.stderr
        assert read_json(tmp_path / "lock.json")["pid"] == first.pid
    finally:
        first.kill()
        first.wait()


INVALID_LOCKS = {
    "torn": '{"run": ',
    "empty": "",
    "list": "[]",
    "number": "7",
    "nested": "[" * 100_000,
    "pid that is a string": {"pid": "abc"},
    "pid out of range": {"pid": 10**30},
    "pid of a group": {"pid": -1},
    "pid that is a boolean": {"pid": True},
    "time that is a string": {"refreshed": "now"},
    "time out of range": {"refreshed": 1e300},
    "host that is a list": {"host": []},
    "machine that is a number": {"machine": 3},
    "no start time": {"born": None},
}


@pytest.mark.parametrize("name", INVALID_LOCKS)
def test_an_invalid_lock_file_is_ignored(tmp_path, name):
    content = INVALID_LOCKS[name]
    if isinstance(content, str):
        (tmp_path / "lock.json").write_text(content)
    else:
        write_foreign_lock(tmp_path, **{"host": socket.gethostname(), **content})
    with Lock(tmp_path, primary=True):
        assert read_json(tmp_path / "lock.json")["pid"] == os.getpid()


def test_an_unreadable_lock_is_an_error(tmp_path):
    (tmp_path / "lock.json").mkdir()
    with pytest.raises(UserError, match=r"lock\.json: cannot be read \(Is a directory\)"):
        Lock(tmp_path, primary=True).__enter__()


def test_a_waiting_process_logs_that_and_then_takes_the_lock(tmp_path, holder, short_intervals, monkeypatch):
    lines = []

    def end_holder(message, *values):
        lines.append(message % values)
        holder.kill()
        holder.wait()

    monkeypatch.setattr(workdir.logger, "info", end_holder)
    with Lock(tmp_path, primary=True, wait=True):
        assert lines == [f"waiting for process {holder.pid} on {socket.gethostname()}, which uses {tmp_path}"]
        assert read_json(tmp_path / "lock.json")["pid"] == os.getpid()


TAKE_TURNS = """
import sys, time
from llmjax.run.workdir import Lock
sys.stdin.readline()
with Lock(sys.argv[1], primary=True, wait=True):
    with open(sys.argv[1] + "/order", "a") as file:
        file.write("in ")
        file.flush()
        time.sleep(0.05)
        file.write("out ")
"""


def test_processes_that_start_together_take_turns(tmp_path):
    write_foreign_lock(tmp_path, host=socket.gethostname(), machine=workdir._machine_id(), pid=2**22 + 1)  # a dead one
    command = [
        sys.executable,
        "-c",
        TAKE_TURNS.replace("time\n", "time; import llmjax.run.workdir as w; w._POLL_SECONDS = 0.01\n", 1),
    ]
    processes = [subprocess.Popen([*command, str(tmp_path)], stdin=subprocess.PIPE, text=True) for _ in range(5)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert (tmp_path / "order").read_text() == "in out " * 5


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced"])
def test_check_detects_a_moved_folder_and_does_not_create_it_again(tmp_path, change, monkeypatch):
    monkeypatch.setattr(workdir, "REFRESH_SECONDS", 0.01)
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock(folder, primary=True) as lock:
        lock.check()
        if change == "removed":
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)  # the lock may have been rewritten meanwhile
        else:
            folder.rename(tmp_path / "elsewhere")
        if change == "replaced":
            folder.mkdir()
        with pytest.raises(UserError, match="removed or renamed while this run was writing to it"):
            lock.check()
    assert folder.exists() == (change == "replaced") and not list(folder.glob("*"))


def test_a_failed_write_leaves_the_old_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, "ü"]})
    assert read_json(path) == {"a": [1, 2.5, "ü"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": [1, 2.5, "ü"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000])
def test_invalid_json_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: .*restore the file or remove it") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_a_path_that_is_not_a_file_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"loop: cannot be read"):
        read_json(tmp_path / "loop")


def test_a_missing_json_file_is_none(tmp_path):
    assert read_json(tmp_path / "none.json") is None
