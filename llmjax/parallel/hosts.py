"""Jobs of several processes: initialisation, agreement, barriers with a time limit, and rows of the global batch."""

import collections
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.parallel import cluster, interrupts, rendezvous
from llmjax.parallel.cluster import read_number

logger = logging.getLogger(__name__)

CPU_THREADS = 8  # default of parallel.cpu_threads
_calls: collections.Counter[str] = collections.Counter()  # exchanges of each name; equal on all processes
END_SECONDS = 5.0  # how long process 0 stays for the others after a failure: their connection to the job ends with it
STOP_SECONDS = 60.0  # and where all processes stop on request
_end_announced = threading.Event()
_coordinator_host = ""  # of the job that was joined


def set_cpu_threads(count: int) -> None:
    """Give XLA's CPU backend `count` threads; must run before anything touches a device.

    XLA splits matrix products by the size of its thread pool, and a split changes how sums are rounded. The default
    size is max(cores, local devices), which differs between machines and between process layouts. PJRT_NPROC takes
    precedence over NPROC, which XLA reads as well.
    """
    os.environ["PJRT_NPROC"] = str(count)


def initialize(cpu_threads: int = CPU_THREADS) -> None:
    """Join the job that the environment describes (cluster.find_job); must run before anything touches a device.

    cpu_threads     size of XLA's thread pool on CPU (parallel.cpu_threads)

    LLMJAX_CPU_DEVICES emulates that many devices in this process. LLMJAX_INIT_SECONDS (300) bounds the wait for the
    other processes, LLMJAX_HEARTBEAT_SECONDS (100) the time without a heartbeat after which a process counts as dead.
    LLMJAX_LAUNCHER_PID is the process that started this one; on Linux this process ends when the launcher does.
    Raises UserError for incomplete or malformed variables, where JAX_PLATFORMS names a platform that is not installed,
    and where this process has more CPU devices than threads; TimeoutError naming the processes that do not come.
    """
    set_cpu_threads(cpu_threads)
    if (devices := read_number(os.environ, "LLMJAX_CPU_DEVICES")) is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    end_with_launcher(read_number(os.environ, "LLMJAX_LAUNCHER_PID"))
    _join_job()
    if jax.distributed.is_initialized():
        interrupts.take_over_sigterm()
    _check_platform(jax.config.jax_platforms)  # type: ignore[attr-defined]
    if jax.default_backend() == "cpu" and cpu_threads < jax.local_device_count():
        raise UserError(
            f"parallel.cpu_threads={cpu_threads}: XLA takes a thread for each of the {jax.local_device_count()} CPU "
            f"devices of a process; set it to {jax.local_device_count()} or more, or emulate fewer devices"
        )


def heartbeat_seconds() -> int:
    """The time without a heartbeat after which JAX takes a process for dead and aborts the others."""
    return read_number(os.environ, "LLMJAX_HEARTBEAT_SECONDS", 100)


def _join_job() -> None:
    """Connect to the other processes of the job, if there are any, and log how the job was found."""
    global _coordinator_host
    seconds = read_number(os.environ, "LLMJAX_INIT_SECONDS", 300)
    job = cluster.find_job(os.environ, cluster.metadata_reader(os.environ))
    if job.num_processes > 1:  # one process needs no network collectives, whose sums may round differently
        host, port = cluster.split_address(job.coordinator)
        _coordinator_host = host
        bind = job.coordinator if cluster.is_loopback(host) else f"[::]:{port}"
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", bind)
        rendezvous.meet(job, seconds, bind)
        jax.distributed.initialize(
            job.coordinator,
            job.num_processes,
            job.process_id,
            local_device_ids=job.local_device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=heartbeat_seconds(),
            shutdown_timeout_seconds=60,
        )
    if job.source:
        logger.info("%s", job)


def _check_platform(platforms: str | None) -> None:
    """Raise UserError where JAX_PLATFORMS is not installed; JAX raises an empty AssertionError, or prints a page."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        if not platforms or "known backends" not in (str(error) or "known backends"):
            raise
        raise UserError(
            f"JAX_PLATFORMS={platforms!r}: this installation has no such devices; install their extra, or unset it"
        ) from error


def end_with_launcher(launcher: int | None) -> None:
    """Let the kernel kill this process when its launcher dies; otherwise it would keep a lock, or a core busy."""
    if launcher is not None and launcher == os.getppid() and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _client() -> Any:
    """The coordination service's client, None in a job of one process. JAX has no public name for it."""
    try:
        from jax._src.distributed import global_state

        client = global_state.client
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"jax {jax.__version__} keeps its coordination client elsewhere: install an older jax, or adapt "
            "llmjax/parallel/hosts.py"
        ) from error
    if client is None and jax.process_count() > 1:
        raise RuntimeError("a job of several processes must start with llmjax.parallel.hosts.initialize()")
    return client


def coordinator_host() -> str:
    """The address of process 0 as the other processes know it; "" in a job of one process."""
    return _coordinator_host


def is_primary() -> bool:
    """Whether this process is process 0, which writes the files of the job."""
    return jax.process_index() == 0


def exchange(name: str, text: str = "", timeout_seconds: float = 300) -> list[str]:
    """Every process's short `text`, in process order, through the coordination service, without devices.

    All processes call it with the same name, in the same order. Raises TimeoutError naming the processes that did not.
    """
    client = _client()
    if client is None:
        return [text]
    folder = f"llmjax/{name}/{_calls[name]}"
    stale = f"llmjax/{name}/{_calls[name] - 1}/{jax.process_index()}"
    _calls[name] += 1
    client.key_value_set(f"{folder}/{jax.process_index()}", text)
    try:
        client.wait_at_barrier(folder, int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        missing = sorted(set(range(jax.process_count())) - _arrived(client, folder).keys())
        raise TimeoutError(
            f"process {', '.join(map(str, missing))} did not reach {name!r} within {timeout_seconds:g} s"
        ) from error
    texts = _arrived(client, folder)
    if _calls[name] > 1:
        client.key_value_delete(stale)  # every process has passed this barrier, so all have read the call before it
    return [texts[process] for process in range(jax.process_count())]


def _arrived(client: Any, folder: str) -> dict[int, str]:
    return {int(key.rsplit("/", 1)[1]): text for key, text in client.key_value_dir_get(folder)}


def publish(key: str, text: str, *, overwrite: bool = True) -> None:
    """Show a short text to all processes; without `overwrite` the first text of a key stays. Nobody waits for it."""
    if (client := _client()) is None:
        return
    try:
        client.key_value_set(f"llmjax/{key}", text, allow_overwrite=overwrite)
    except jax.errors.JaxRuntimeError as error:
        if overwrite or "ALREADY_EXISTS" not in str(error):
            raise


def published(folder: str) -> dict[str, str]:
    """Name -> text of what was published under FOLDER/NAME. Blocks while process 0 is stopped."""
    client = _client()
    return {} if client is None else {k.rsplit("/", 1)[1]: v for k, v in client.key_value_dir_get(f"llmjax/{folder}")}


def barrier(name: str, timeout_seconds: float = 300) -> None:
    """Wait until every process calls this. Raises TimeoutError naming the processes that did not."""
    exchange(f"barrier/{name}", "", timeout_seconds)


def agree(value: bool, name: str = "agree") -> bool:
    """Whether `value` is true on all processes; the same answer on all of them."""
    return all(text == "1" for text in exchange(name, "1" if value else "0"))


def broadcast(name: str, text: str, timeout_seconds: float = 300) -> str:
    """The `text` of the primary process, on all processes."""
    return exchange(name, text if is_primary() else "", timeout_seconds)[0]


def all_equal(name: str, text: str) -> None:
    """Raise UserError where processes have different texts; it names those that differ from process 0."""
    texts = exchange(name, text)
    different = [process for process, other in enumerate(texts) if other != texts[0]]
    if different:
        raise UserError(
            f"{name} on process {', '.join(map(str, different))} differs from process 0 "
            f"({texts[different[0]][:64]!r} against {texts[0][:64]!r}): give every process the same files and config"
        )


def local_rows(sharding: NamedSharding, global_batch: int) -> np.ndarray:
    """Rows of the global batch that this process's devices hold: sorted indices, int64 [local rows].

    sharding    that of a batch; rows that several devices hold appear once
    """
    rows = NamedSharding(sharding.mesh, P(*sharding.spec[:1])).devices_indices_map((global_batch,))
    local = {
        index[0].indices(global_batch)[:2]
        for device, index in rows.items()
        if device.process_index == jax.process_index()
    }
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(local)])


def global_batch(sharding: NamedSharding, local: Batch, rows: np.ndarray, global_batch: int) -> Batch:
    """The Batch of global arrays [global_batch, ...]; `local` has this process's `rows` (of `local_rows`)."""
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)

    def to_global(field: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(global_batch)
            first = int(np.searchsorted(rows, start))
            return field[first : first + stop - start]

        return jax.make_array_from_callback((global_batch, *field.shape[1:]), sharding, shard, dtype=field.dtype)

    return jax.tree.map(to_global, local)


def announce_end(status: int, dead: int = 0, seconds: float = END_SECONDS) -> None:
    """Tell the other processes, once, that this one ends. Process 0 waits up to `seconds` until all have said so.

    Its coordination service ends with it, which aborts the others. It does not wait for `dead` processes.
    """
    if _end_announced.is_set():
        return
    _end_announced.set()
    deadline = time.monotonic() + seconds
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        publish(f"ends/{jax.process_index()}", str(status))
        while is_primary() and time.monotonic() < deadline and len(published("ends")) < jax.process_count() - dead:
            time.sleep(0.1)


def exit_now(code: int, seconds: float = END_SECONDS) -> NoReturn:
    """Flush the logs and end this process at once; process 0 gives the others up to `seconds` to end before it.

    After a failure in a job of several processes an ordinary exit would wait for the others in JAX's shutdown barrier,
    then abort with another code.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        # Nothing can be announced to a process 0 that is stopped.
        threading.Timer(seconds + END_SECONDS, os._exit, [code]).start()
        announce_end(code, seconds=seconds)
        if is_primary():
            time.sleep(1)  # from their last word to their end
    os._exit(code)
