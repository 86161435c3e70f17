"""Runners that execute functions on many parts: local processes, or a Ray cluster.

`map` runs a function on every task. `exchange` also shuffles: every task divides its rows into partitions, and each
partition is then reduced. The results depend on the tasks alone.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import itertools
import logging
import os
from pathlib import Path
import pickle
import shutil
import socket
from typing import Any, Protocol

import numpy as np

from llmjax.data.store.workers import Workers
from llmjax.errors import UserError

_MAX_RUNNING = 1000  # submitted tasks, more than a cluster has cores
_SHUFFLE_BLOCKS = 256  # blocks of a Ray shuffle, which moves the square of this number of pieces

Mapper = Callable[..., dict[int, np.ndarray]]  # task -> partition -> rows
Reducer = Callable[..., Any]  # (rows of all tasks in any order, *shared) -> result
Exchange = Callable[[Mapper, list[tuple], Reducer, tuple], Iterator[Any]]  # Runner.exchange with its folder bound


class Runner(Protocol):
    """Executes functions on tasks."""

    def map(self, function: Callable, tasks: list[tuple]) -> Iterator[tuple[int, Any]]:
        """(index of the task, function(*task)) of all tasks, in any order."""
        ...

    def exchange(
        self, mapper: Mapper, tasks: list[tuple], reducer: Reducer, shared: tuple, folder: Path
    ) -> Iterator[Any]:
        """reducer(rows, *shared) of every partition, in any order. `folder` is for intermediate files."""
        ...


class LocalRunner(Workers):
    """Processes of this machine. A context manager."""

    def __init__(self, num_workers: int):
        super().__init__(num_workers, hint="set curate.workers to a smaller number")

    def exchange(self, mapper, tasks, reducer, shared, folder):
        """Partitions are exchanged as files, so memory does not grow with the corpus."""
        shutil.rmtree(folder, ignore_errors=True)
        map_tasks = [(mapper, task, folder, index) for index, task in enumerate(tasks)]
        partitions = {partition for _, written in self.map(_write_partitions, map_tasks) for partition in written}
        reduce_tasks = [(reducer, folder / str(partition), shared) for partition in sorted(partitions)]
        for _, result in self.map(_reduce, reduce_tasks):
            yield result
        shutil.rmtree(folder, ignore_errors=True)


def _write_partitions(mapper: Mapper, task: tuple, folder: Path, index: int) -> list[int]:
    rows_by_partition = mapper(*task)
    for partition, rows in rows_by_partition.items():
        (folder / str(partition)).mkdir(parents=True, exist_ok=True)
        np.save(folder / str(partition) / f"{index}.npy", rows)
    return list(rows_by_partition)


def _reduce(reducer: Reducer, folder: Path, shared: tuple) -> Any:
    return reducer(np.concatenate([np.load(path) for path in sorted(folder.iterdir())]), *shared)


class RayRunner:
    """The Ray cluster at `address` ("auto": the one of this machine; "local": a new one on this machine).

    Tasks read and write files, so the workdir and the inputs must have the same path on all nodes. Ray reruns the tasks
    of a worker or node that dies. A context manager.
    """

    def __init__(self, address: str):
        try:
            import ray
            import ray.data
            from ray.data.context import ShuffleStrategy
        except ImportError:
            raise UserError("--runner=ray: Ray is not installed; pip install 'llmjax[ray]'") from None
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._starts_ray = not ray.is_initialized()
        if self._starts_ray:
            with _as_user_error(address):
                _check_port(address)
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # llmjax logs its own progress
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # A sort shuffle uses the existing workers; a hash shuffle starts new ones, which takes seconds.
        context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED

    def __enter__(self) -> "RayRunner":
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._starts_ray:
            ray.shutdown()

    def map(self, function: Callable, tasks: list[tuple]) -> Iterator[tuple[int, Any]]:
        """Runs Ray tasks: Ray Data leaves a core idle for 0.2 s between two tasks, Ray tasks for a few milliseconds."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        remote = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_ray_call)
        pending, running = iter(enumerate(tasks)), []
        while True:
            submitted = itertools.islice(pending, _MAX_RUNNING - len(running))
            running += [remote.remote(function, *task) for task in submitted]
            if not running:
                return
            finished, running = ray.wait(running)
            try:
                index, result = ray.get(finished[0])
            except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"--runner=ray: the process of a task died repeatedly ({reason}); give its node more memory or "
                    "fewer cores (`ray start --num-cpus=`) and rerun the command: finished parts are kept"
                ) from None
            if isinstance(result, UserError):
                raise result
            yield index, result

    def exchange(self, mapper, tasks, reducer, shared, folder):
        """Ray Data shuffles the rows, through the object store."""
        if not tasks:
            return
        import ray

        items = [{"task": pickle.dumps(task)} for task in tasks]
        rows = ray.data.from_items(items, override_num_blocks=min(len(items), _SHUFFLE_BLOCKS))
        partitions = rows.flat_map(functools.partial(_ray_partition, mapper=mapper), num_cpus=1)
        reduced = partitions.groupby("partition").map_groups(
            functools.partial(_ray_reduce, reducer=reducer, shared=shared), batch_format="pandas"
        )
        for row in reduced.iter_rows():
            yield pickle.loads(row["result"])


def _check_port(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextlib.contextmanager
def _as_user_error(address: str):
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--ray_address={address}: no cluster answers ({reason}); start one with `ray start --head`, or use "
            "--ray_address=local"
        ) from None


def _ray_call(function: Callable, index: int, task: tuple) -> tuple[int, Any]:
    try:
        return index, function(*task)
    except UserError as error:  # bad input: Ray must not rerun the task
        return index, error


def _ray_partition(row: dict, mapper: Mapper) -> Iterator[dict]:
    for partition, rows in mapper(*pickle.loads(row["task"])).items():
        yield {"partition": partition, "rows": pickle.dumps(rows)}


def _ray_reduce(group, reducer: Reducer, shared: tuple) -> dict:
    rows = np.concatenate([pickle.loads(data) for data in group["rows"]])
    return {"result": [pickle.dumps(reducer(rows, *shared))]}
