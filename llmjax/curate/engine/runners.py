"""Runners that execute stage functions over many parts: local processes, or a Ray cluster.

Both offer `map`, one task after another wherever there is room, and `exchange`, in which every task sorts its results
into partitions and every partition is then reduced as a whole. What comes out depends on the tasks alone.
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

_MAX_RUNNING = 1000  # tasks that a cluster holds at once: more than it has cores
_SHUFFLE_BLOCKS = 256  # blocks of a Ray shuffle; it moves the square of this many pieces

Mapper = Callable[..., dict[int, np.ndarray]]  # task -> partition -> rows
Reducer = Callable[..., Any]  # (rows of all tasks in any order, *shared) -> result


class Runner(Protocol):
    """Executes functions over tasks; the results depend on the tasks alone."""

    def map(self, function: Callable, tasks: list[tuple]) -> Iterator[tuple[int, Any]]:
        """(index of the task, function(*task)), in any order."""
        ...

    def exchange(
        self, mapper: Mapper, tasks: list[tuple], reducer: Reducer, shared: tuple, folder: Path
    ) -> Iterator[Any]:
        """Every partition's reducer(rows, *shared), in any order. `folder` is for what goes between."""
        ...


class LocalRunner(Workers):
    """Processes of this machine. A context manager."""

    def __init__(self, num_workers: int):
        super().__init__(num_workers, hint="set curate.workers to a smaller number")

    def exchange(self, mapper, tasks, reducer, shared, folder):
        """Partitions go over the disk: what is held in memory does not grow with the corpus."""
        shutil.rmtree(folder, ignore_errors=True)
        found = {
            p for _, parts in self.map(_spill, [(mapper, t, folder, i) for i, t in enumerate(tasks)]) for p in parts
        }
        for _, result in self.map(_reduce, [(reducer, folder / str(part), shared) for part in sorted(found)]):
            yield result
        shutil.rmtree(folder, ignore_errors=True)


def _spill(mapper: Mapper, task: tuple, folder: Path, index: int) -> list[int]:
    parts = mapper(*task)
    for part, rows in parts.items():
        (folder / str(part)).mkdir(parents=True, exist_ok=True)
        np.save(folder / str(part) / f"{index}.npy", rows)
    return list(parts)


def _reduce(reducer: Reducer, folder: Path, shared: tuple) -> Any:
    return reducer(np.concatenate([np.load(path) for path in sorted(folder.iterdir())]), *shared)


class RayRunner:
    """Ray on the cluster at `address` ("auto": the one that this machine belongs to; "local": a new one here).

    Tasks read and write files, so the workdir and the inputs must be visible to all nodes under the same path. Ray
    repeats the tasks of a worker or node that dies. A context manager.
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
        # By sorted keys, in the workers that exist: hashing starts new ones for every shuffle, which takes seconds.
        context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED

    def __enter__(self) -> "RayRunner":
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._starts_ray:
            ray.shutdown()

    def map(self, function: Callable, tasks: list[tuple]) -> Iterator[tuple[int, Any]]:
        """By Ray's own tasks: Ray Data leaves a core idle for 0.2 s between two tasks, they for a few milliseconds."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        remote = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_ray_call)
        waiting, running = iter(enumerate(tasks)), []
        while True:
            running += [
                remote.remote(function, *task) for task in itertools.islice(waiting, _MAX_RUNNING - len(running))
            ]
            if not running:
                return
            finished, running = ray.wait(running)
            try:
                index, result = ray.get(finished[0])
            except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"--runner=ray: a task's process ended again and again ({reason}); give its node more memory or "
                    "fewer cores (`ray start --num-cpus=`) and run again: finished parts are kept"
                ) from None
            if isinstance(result, UserError):
                raise result
            yield index, result

    def exchange(self, mapper, tasks, reducer, shared, folder):
        """The shuffle is Ray Data's: rows go from node to node by the object store."""
        if not tasks:
            return
        import ray

        items = [{"task": pickle.dumps(task)} for task in tasks]
        rows = ray.data.from_items(items, override_num_blocks=min(len(items), _SHUFFLE_BLOCKS))
        parted = rows.flat_map(functools.partial(_ray_partition, mapper=mapper), num_cpus=1)
        reduced = parted.groupby("partition").map_groups(
            functools.partial(_ray_reduce, reducer=reducer, shared=shared), batch_format="pandas"
        )
        for row in reduced.iter_rows():
            yield pickle.loads(row["result"])


def _check_port(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
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
            f"--ray_address={address}: no cluster answers ({reason}); start one with `ray start --head`, or give "
            "--ray_address=local"
        ) from None


def _ray_call(function: Callable, index: int, task: tuple) -> tuple[int, Any]:
    try:
        return index, function(*task)
    except UserError as error:  # bad input: Ray must not repeat the task
        return index, error


def _ray_partition(row: dict, mapper: Mapper) -> Iterator[dict]:
    for part, rows in mapper(*pickle.loads(row["task"])).items():
        yield {"partition": part, "rows": pickle.dumps(rows)}


def _ray_reduce(group, reducer: Reducer, shared: tuple) -> dict:
    rows = np.concatenate([pickle.loads(data) for data in group["rows"]])
    return {"result": [pickle.dumps(reducer(rows, *shared))]}
