"""A pool of Python processes without device code, which end with their parent process."""

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
from typing import IO, Any, Self

from llmjax.errors import UserError

logger = logging.getLogger(__name__)
_SERVE = "from llmjax.data.store.workers import serve; serve()"


class Workers:
    """`num_workers` processes; `map` runs tasks on them. A context manager.

    The processes are started with `python -c`, so the script of the caller is not imported again and needs no
    `if __name__ == "__main__"`.

    hint  how to fix a process that ran out of memory, for errors
    """

    def __init__(self, num_workers: int, *, hint: str = "set data.workers to a smaller number"):
        self._hint = hint
        # One thread per process, since the processes already use all cores.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C reaches this process alone, which ends the others without tracebacks
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
            for pipe in filter(None, (process.stdin, process.stdout)):
                # Closing writes what is still buffered, which fails for a process that has ended.
                with contextlib.suppress(OSError):
                    pipe.close()

    def map(self, function: Callable, tasks: list[tuple]) -> Iterator[tuple[int, Any]]:
        """Yield (index of the task, function(*task)) as tasks finish. The first exception of a task is raised here.

        Raises UserError if a process is killed, which the system does when memory runs out.
        """
        pending: queue.SimpleQueue = queue.SimpleQueue()
        finished: queue.SimpleQueue = queue.SimpleQueue()
        for index, task in enumerate(tasks):
            pending.put((index, task))
        for process in self._processes[: len(tasks)]:
            arguments = (process, function, pending, finished)
            threading.Thread(target=self._run_tasks, args=arguments, daemon=True).start()
        for _ in tasks:
            index, error, result = finished.get()
            if error is not None:
                raise error
            yield index, result

    def _run_tasks(
        self, process: subprocess.Popen, function: Callable, pending: queue.SimpleQueue, finished: queue.SimpleQueue
    ) -> None:
        """Give one process a task after the other, in a thread of the parent."""
        assert process.stdin and process.stdout
        while True:
            try:
                index, task = pending.get_nowait()
            except queue.Empty:
                return
            try:
                _send(process.stdin, (function, task))
                error, result = pickle.load(process.stdout)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # ValueError: the pool closed the pipe
                error, result = self._worker_died(process), None
            finished.put((index, error, result))
            if error is not None:
                return

    def _worker_died(self, process: subprocess.Popen) -> UserError:
        return UserError(
            f"a process that prepares the data ended with status {process.wait()} (-9: usually out of memory); "
            f"{self._hint} and run again: finished shards are kept"
        )


def _send(pipe: IO[bytes], message: Any) -> None:
    pipe.write(pickle.dumps(message))
    pipe.flush()


def with_progress(
    what: str, results: Iterator[tuple[int, Any]], count: int, sizes: list[int] | None = None
) -> list[Any]:
    """Return the results of `count` tasks in task order; log rate and time left every 5 seconds, and the total time.

    results  (index of the task, result) of each task as it finishes
    sizes    bytes of each task; without them progress is counted in tasks
    """
    ordered: list[Any] = [None] * count
    weights = sizes or [1] * count
    scale, digits, unit = (1e6, 1, "MB") if sizes else (1, 0, "part" if count == 1 else "parts")
    start = last = time.monotonic()
    total, finished = sum(weights), 0
    for index, result in results:
        ordered[index] = result
        finished += weights[index]
        now = time.monotonic()
        if now - last > 5 and 0 < finished < total:
            last, rate = now, finished / (now - start)
            logger.info(
                f"{what}: {finished / scale:,.0f} of {total / scale:,.0f} {unit}, {rate / scale:,.1f} {unit}/s, "
                f"{(total - finished) / rate:.0f} s left",
                extra={"progress": True},
            )
    logger.info(f"{what}: {total / scale:,.{digits}f} {unit} in {time.monotonic() - start:.1f} s")
    return ordered


def count_cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve() -> None:
    """Run a worker: (function, arguments) from stdin, (error, result) to stdout; it ends when the parent does."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    requests: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        function, task = requests.get()
        try:
            reply = (None, function(*task))
        except Exception as error:
            reply = (_picklable(error), None)
        try:
            _send(replies, reply)
        except BrokenPipeError:
            os._exit(1)


def _listen(requests: queue.SimpleQueue) -> None:
    """End the process as soon as the parent's end of the pipe closes, even in the middle of a task."""
    while True:
        try:
            requests.put(pickle.load(sys.stdin.buffer))
        except Exception:  # EOFError, or a task that was cut off: the parent is gone
            os._exit(1)


def _picklable(error: Exception) -> Exception:
    """The error itself if it can be pickled, else a RuntimeError that quotes it."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
