"""A run's folder: small files written whole or not at all, and a lock that outlives no run.

Works on any path that epath knows: whole-file writes alone, neither append nor flock, so object stores serve as well.
"""

import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any
import uuid

from etils import epath

from llmjax.config import UserError

REFRESH_SECONDS = 10.0
EXPIRY_SECONDS = 60.0


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write `value` as JSON; a reader sees the old file or the new one, never a part."""
    path = epath.Path(path)
    text = json.dumps(value, indent=1) + "\n"
    if "://" in str(path):  # an object appears whole, when its upload is complete
        path.write_text(text)
        return
    part = pathlib.Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: epath.PathLike, kind: type = dict) -> Any:
    """The value in a JSON file, None where there is no file. Raises UserError where it is no JSON of that kind."""
    try:
        value = json.loads(epath.Path(path).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file or remove it") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: not a JSON {'object' if kind is dict else 'list'}; restore the file or remove it")
    return value


class Lock:
    """`with Lock(workdir, primary=True):` one job at a time in a workdir. Only a job's primary process holds it.

    WORKDIR/lock.json names the holder and is rewritten every 10 s. The lock of a process that died on this host is
    taken over at once; one of another host after 60 s without a rewrite, or after 15 s of watching one that looks old.
    Raises UserError naming the host and process where the workdir is in use.
    """

    def __init__(self, workdir: epath.PathLike, *, primary: bool):
        self._path = epath.Path(workdir) / "lock.json"
        self._primary = primary
        self._me = {
            "run": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "started": time.time(),
        }
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="workdir lock", daemon=True)

    def __enter__(self) -> "Lock":
        if self._primary:
            self._wait_for_the_dead()
            self._write()
            time.sleep(0.1)  # of two that start together, the later writer wins; let both see who that is
            self._refuse_unless(self._read() in (None, self._me["run"]))
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._primary:
            self._released.set()
            self._thread.join()
            if self._read() == self._me["run"]:
                self._path.unlink(missing_ok=True)

    def _wait_for_the_dead(self) -> None:
        """Return once nobody alive holds the lock."""
        seen = self._holder()
        if seen is None or (seen["host"] == self._me["host"] and not _alive(seen)):
            return
        self._refuse_unless(seen["host"] != self._me["host"])
        age = time.time() - seen["refreshed"]
        # Even a lock that looks old is watched for longer than a refresh takes: the other host's clock may be wrong.
        end = time.monotonic() + min(EXPIRY_SECONDS, max(EXPIRY_SECONDS - age, 1.5 * REFRESH_SECONDS))
        while time.monotonic() < end:
            time.sleep(min(1.0, REFRESH_SECONDS))
            now = self._holder()
            if now is None:
                return
            self._refuse_unless(now == seen)

    def _refuse_unless(self, free: bool) -> None:
        if not free:
            holder = self._holder() or {"host": "unknown", "pid": "unknown"}
            raise UserError(
                f"workdir {self._path.parent} is in use by process {holder['pid']} on {holder['host']}: "
                "wait for it, stop it, or take another --workdir"
            )

    def _holder(self) -> dict[str, Any] | None:
        """Who holds the lock; a file that is no lock holds nothing."""
        try:
            holder = read_json(self._path)
        except UserError:
            return None
        fields = {*self._me, "refreshed"}
        return holder if holder is not None and fields <= holder.keys() else None

    def _read(self) -> str | None:
        holder = self._holder()
        return holder["run"] if holder else None

    def _write(self) -> None:
        write_json(self._path, {**self._me, "refreshed": time.time()})

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH_SECONDS):
            try:
                holder = self._read()
                if holder in (None, self._me["run"]):
                    self._write()
                    continue
            except OSError:
                continue  # a disk that is full or away for a while; the lock stays ours until it expires
            print(
                f"llmjax: error: workdir {self._path.parent} was taken over by another run while this one stood still",
                file=sys.stderr,
                flush=True,
            )
            os._exit(78)


def _born(pid: int) -> str:
    """When a process of this host started, in clock ticks since boot, with the boot's id; '' where that is unknown.

    Tells a process from a later one with the same number, as in a container that is started again.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{boot} {fields[19]}"


def _alive(holder: dict[str, Any]) -> bool:
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return _born(holder["pid"]) == holder["born"] and not _zombie(holder["pid"])


def _zombie(pid: int) -> bool:
    """Killed, but its parent has not asked for its exit status yet."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
