"""The workdir of a run: file names, atomic JSON files, and the lock.

The lock works on any path that epath supports: it only writes whole files, so object stores work too. The library
filelock does not fit: it needs flock or exclusive creation, and cannot detect a holder that died on another host. The
token store uses the same lock.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any
import uuid

from etils import epath

from llmjax import atomic
from llmjax.errors import UserError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

# Files of a workdir.
CONFIG = "config.json"  # the resolved config
RUN = "run.json"  # devices, versions, restarts
DATA = "data.json"  # sizes of the packed data
METRICS = "metrics.jsonl"  # one line every train.log_every steps
SAMPLES = "samples.json"  # texts that the trained model generated
PLAN = "plan.json"  # what `llmjax plan` predicted of the step
REFERENCE = "reference.npz"  # log-likelihoods under the reference model of DPO
IMPORT = "import.json"  # where imported parameters come from
REPORT = "report.html"
REPORT_JSON = "report.json"  # numbers of the report that no other file has
ANALYSIS, ANALYSIS_PAGE = "analysis.json", "analysis.html"  # of the task that was analysed last
LOCK = "lock.json"  # the process that writes here

# Folders of a workdir.
CHECKPOINTS = "checkpoints"  # checkpoints/<step>
EVAL = "eval"  # eval/<step>/<split>.json
EVENTS = "events"  # for TensorBoard
STORE = "store"  # the token store, where data.store names no other folder
PROFILE = "profile"  # traces of the JAX profiler
TOKENIZER = "tokenizer"  # the tokenizer of an imported model
COMPILATION_CACHE = "compilation_cache"

REFRESH_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
_POLL_SECONDS = 1.0
_REPEAT_SECONDS = 60.0  # between two lines about waiting
_BAD_INPUT = 78

logger = logging.getLogger(__name__)


def eval_path(workdir: epath.PathLike, step: int, split: str) -> epath.Path:
    """The file with the scores of one split at one step."""
    return epath.Path(workdir) / EVAL / str(step) / f"{split}.json"


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write `value` as JSON; a reader sees the old file or the new one, never a part of it."""
    atomic.write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: epath.PathLike, kind: type = dict) -> Any:
    """The value in a JSON file, None where there is no file.

    Raises UserError where the path cannot be read, and where its content is not JSON of that kind.
    """
    try:
        value = json.loads(epath.Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore the file or remove it") from error
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply; restore the file or remove it") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file or remove it") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: not a JSON {'object' if kind is dict else 'list'}; restore the file or remove it")
    return value


def read_run_config(workdir: epath.Path) -> dict[str, Any] | None:
    """The config.json of a training run; None if there is no file. Raises UserError for the workdir of a corpus."""
    tree = read_json(workdir / CONFIG)
    if tree is not None and "curate" in tree:
        raise UserError(
            f"--workdir={workdir}: contains a corpus, not a training run; give another folder, or show the corpus with "
            f"`llmjax curate report --workdir={workdir}`"
        )
    return tree


class Lock:
    """`with Lock(workdir, primary=True):` one job at a time in a folder. Only a job's primary process holds it.

    FOLDER/lock.json names the holder and is rewritten every 10 s. The lock of a process that died on this machine is
    taken over at once; any other after 60 s without a rewrite, or after 15 s of watching one that looks old. A machine
    is identified by the boot of its kernel and the namespace of process ids: two containers with one host name are two
    machines.

    wait   wait for the lock of a folder in use, and log that. Without it, a folder in use raises UserError naming the
           process and its host.
    name   of the lock's file
    """

    def __init__(self, folder: epath.PathLike, *, primary: bool, wait: bool = False, name: str = LOCK):
        self._folder = epath.Path(folder)
        self._path = self._folder / name
        self._primary = primary
        self._wait = wait
        self._inode: tuple[int, int] | None = None
        self._content = {
            "run": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine_id(),
            "pid": os.getpid(),
            "born": _start_time(os.getpid()),
            "started": time.time(),
        }
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="workdir lock", daemon=True)

    def __enter__(self) -> "Lock":
        if self._primary:
            while not self._acquire():
                pass
            self._inode = _inode(self._folder)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._primary:
            self._released.set()
            self._thread.join()
            with contextlib.suppress(FileNotFoundError), _exclusive(self._folder):
                if not self._is_taken_over():
                    self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise UserError where the folder was removed, renamed or replaced since the lock was taken.

        Call it before a run writes: writers create missing folders, and would continue in a new, empty one.
        """
        if self._primary and _inode(self._folder) != self._inode:
            raise UserError(
                f"{self._folder} was removed or renamed while this run was writing to it; stopped. Put it back and "
                "rerun the same command to resume, or take another --workdir"
            )

    def _acquire(self) -> bool:
        """Take the lock once no live process holds it. False where another process took it at the same moment."""
        watched, deadline, reported = None, 0.0, -_REPEAT_SECONDS
        while True:
            with _exclusive(self._folder):
                holder = self._read()
                silent = holder is not None and holder == watched and time.monotonic() >= deadline
                if holder is None or silent or self._has_died(holder):
                    self._write()
                    break
            if watched is None or holder != watched:
                if not self._wait and (watched is not None or self._is_on_this_machine(holder)):
                    raise self._in_use_error(holder)
                # Even a lock that looks old is watched for longer than a refresh takes: the other clock may be wrong.
                age = time.time() - holder["refreshed"]
                patience = min(EXPIRY_SECONDS, max(EXPIRY_SECONDS - age, 1.5 * REFRESH_SECONDS))
                watched, deadline = holder, time.monotonic() + patience
            elif self._is_on_this_machine(holder):
                deadline = time.monotonic() + EXPIRY_SECONDS  # the process exists, suspended or busy
            if self._wait and time.monotonic() - reported >= _REPEAT_SECONDS:
                reported = time.monotonic()
                name = f"process {holder['pid']} on {holder['host']}"
                logger.info("waiting for %s, which uses %s", name, self._folder)
            time.sleep(min(_POLL_SECONDS, REFRESH_SECONDS))
        # Without flock, two processes may have written at the same time. The later one wins, as both read its content.
        time.sleep(0.1)
        if not self._is_taken_over():
            return True
        if not self._wait:
            raise self._in_use_error(self._read() or {"host": "unknown", "pid": "unknown"})
        return False

    def _in_use_error(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"workdir {self._folder} is in use by process {holder['pid']} on {holder['host']}: "
            "wait for it, stop it, or take another --workdir"
        )

    def _is_on_this_machine(self, holder: dict[str, Any]) -> bool:
        return (holder["host"], holder["machine"]) == (self._content["host"], self._content["machine"])

    def _has_died(self, holder: dict[str, Any]) -> bool:
        return self._is_on_this_machine(holder) and not _is_alive(holder)

    def _read(self) -> dict[str, Any] | None:
        """The content of the lock; None where there is no lock. Raises UserError where it cannot be read."""
        try:
            holder = read_json(self._path)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return None
        return {"machine": "", **holder} if holder is not None and _is_lock(holder) else None

    def _is_taken_over(self) -> bool:
        holder = self._read()
        return holder is not None and holder["run"] != self._content["run"]

    def _write(self) -> None:
        write_json(self._path, {**self._content, "refreshed": time.time()})

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH_SECONDS):
            try:
                if _inode(self._folder) != self._inode:
                    continue  # removed or renamed: `check` raises; a new folder of that name belongs to another run
                with _exclusive(self._folder):
                    if not self._is_taken_over():
                        self._write()
                        continue
            except (OSError, UserError):
                continue  # the disk is full or unreachable for a while; the lock stays valid until it expires
            print(
                f"llmjax: error: workdir {self._folder} was taken over by another run while this one was suspended",
                file=sys.stderr,
                flush=True,
            )
            os._exit(_BAD_INPUT)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock. `alive` is by its process id on this machine, and by its last write elsewhere."""

    pid: int
    host: str
    alive: bool
    silent_seconds: float


def read_holder(folder: epath.PathLike, name: str = LOCK) -> Holder | None:
    """The holder of FOLDER/lock.json, or of the lock `name`, without taking it; None where there is no lock."""
    lock = Lock(folder, primary=False, name=name)
    holder = lock._read()
    if holder is None:
        return None
    silent = max(time.time() - holder["refreshed"], 0.0)
    alive = _is_alive(holder) if lock._is_on_this_machine(holder) else silent < EXPIRY_SECONDS
    return Holder(holder["pid"], str(holder["host"]), alive, silent)


def _is_lock(holder: dict[str, Any]) -> bool:
    """Whether a JSON object has a lock's fields, each of its type."""
    strings = (holder.get("run"), holder.get("host"), holder.get("born"), holder.get("machine", ""))
    pid, refreshed = holder.get("pid"), holder.get("refreshed")
    if not all(isinstance(text, str) for text in strings) or type(pid) is not int:
        return False
    if not isinstance(refreshed, int | float) or isinstance(refreshed, bool):
        return False
    return 0 < pid < 1 << 31 and abs(refreshed) < 1e15


@contextlib.contextmanager
def _exclusive(folder: epath.Path) -> Iterator[None]:
    """Let one process of this machine at a time read and replace a lock, by flock on its folder.

    Object stores and some network file systems have no flock; there, `Lock` reads the file again after writing it.
    """
    try:
        if fcntl is None or atomic.is_remote(folder):
            raise OSError
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _inode(folder: epath.Path) -> tuple[int, int] | None:
    """Identifies a folder, unlike a later one of the same name; None if missing or in an object store."""
    try:
        stat = None if atomic.is_remote(folder) else os.stat(folder)
    except FileNotFoundError:
        return None
    return (stat.st_dev, stat.st_ino) if stat else None


def _machine_id() -> str:
    """The boot of this kernel and this process's namespace of process ids; '' where that is unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """When a process of this machine started, in clock ticks since boot; '' where that is unknown.

    A later process with the same id, as in a container that is started again, has another start time.
    """
    stat = _stat(pid)
    return stat[19] if stat else ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; [] where /proc is absent or shows another namespace."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return []
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a holder on this machine still runs; a zombie, whose parent has not read its status, does not."""
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    stat = _stat(holder["pid"])
    return not stat or (stat[0] != "Z" and stat[19] == holder["born"])
