"""A pool of fresh Python processes without device code, which end with their parent process."""

from collections.abc import Callable, Iterator
import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO, Self

from llmjax.errors import UserError

logger = logging.getLogger(__name__)
_SERVE = "from llmjax.data.store.workers import serve; serve()"


class Workers:
    """`num_workers` processes; `map` runs tasks on them. A context manager.

    The processes are started as `python -c`, so the caller's own script is not imported again and needs no guard.
    """

    def __init__(self, num_workers: int, *, hint: str = "set data.workers to a smaller number"):
        self._hint = hint  # what may help where a process ran out of memory
        # TOKENIZERS_PARALLELISM: one thread a process, as the processes already fill the cores.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C reaches this process alone, which ends them without their tracebacks
            )
            for _ in range(num_workers)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                # What was still buffered for a process that is gone cannot be delivered, and need not be.
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def map(self, function: Callable, tasks: list[tuple]) -> Iterator[tuple[int, Any]]:
        """(index of the task, function(*task)) as they finish. The first exception of a task is raised here.

        Raises UserError where a process is killed, as the system does when memory runs out.
        """
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        finished: queue.SimpleQueue = queue.SimpleQueue()
        for index, task in enumerate(tasks):
            waiting.put((index, task))
        for process in self._processes[: len(tasks)]:
            threading.Thread(target=_feed, args=(process, function, waiting, finished, self._hint), daemon=True).start()
        for _ in tasks:
            index, error, result = finished.get()
            if error is not None:
                raise error
            yield index, result


def _feed(
    process: subprocess.Popen, function: Callable, waiting: queue.SimpleQueue, finished: queue.SimpleQueue, hint: str
):
    """One process's share of the tasks, by a thread of the parent."""
    while True:
        try:
            index, task = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            _send(process.stdin, (function, task))  # type: ignore[arg-type]
            error, result = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # ValueError: the pool closed the pipe
            error, result = _death(process, hint), None
        finished.put((index, error, result))
        if error is not None:
            return


def _death(process: subprocess.Popen, hint: str) -> UserError:
    code = process.wait()
    return UserError(
        f"a process that prepares the data ended with status {code} (-9: usually out of memory); {hint} and run again: "
        "finished shards are kept"
    )


def _send(pipe: BinaryIO, message: Any) -> None:
    pipe.write(pickle.dumps(message))
    pipe.flush()


def with_progress(what: str, done: Iterator[tuple[int, Any]], count: int, sizes: list[int] | None = None) -> list[Any]:
    """Return the results of `count` tasks in task order; log rate and time left every 5 seconds, and the total time.

    done    (index of the task, result) of each task as it finishes
    sizes   bytes of each task; without them progress is counted in tasks
    """
    results: list[Any] = [None] * count
    weights = sizes or [1] * count
    scale, digits, unit = (1e6, 1, "MB") if sizes else (1, 0, "part" if count == 1 else "parts")
    began = last = time.monotonic()
    total, finished = sum(weights), 0
    for index, result in done:
        results[index] = result
        finished += weights[index]
        now = time.monotonic()
        if now - last > 5 and 0 < finished < total:
            last, rate = now, finished / (now - began)
            logger.info(
                f"{what}: {finished / scale:,.0f} of {total / scale:,.0f} {unit}, {rate / scale:,.1f} {unit}/s, "
                f"{(total - finished) / rate:.0f} s left"
            )
    logger.info(f"{what}: {total / scale:,.{digits}f} {unit} in {time.monotonic() - began:.1f} s")
    return results


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve() -> None:
    """The worker's loop: (function, arguments) from stdin, (error, result) to stdout; ends when the parent does."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    requests: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        function, task = requests.get()
        try:
            reply = (None, function(*task))
        except Exception as error:
            reply = (_portable(error), None)
        try:
            _send(replies, reply)
        except BrokenPipeError:
            os._exit(1)


def _listen(requests: queue.SimpleQueue) -> None:
    """Ends the process as soon as the parent's end of the pipe closes, even in the middle of a task."""
    while True:
        try:
            requests.put(pickle.load(sys.stdin.buffer))
        except Exception:  # EOFError, or a task that was cut off: the parent is gone
            os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the pipe, else a RuntimeError that quotes it."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
