"""The operations of a JAX profiler trace, by the device time that each takes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
import dataclasses
import gzip
import json
from typing import Any
import zlib

from etils import epath

from llmjax.errors import UserError
from llmjax.run import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Operation:
    """One HLO operation: device time in seconds without the operations inside it, and how often it ran."""

    name: str
    seconds: float
    count: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """The newest trace of a run; `operations` are in order of time, longest first."""

    path: epath.Path
    operations: list[Operation]

    @property
    def seconds(self) -> float:
        """Time of all operations, summed over devices and threads."""
        return sum(operation.seconds for operation in self.operations)


def read_profile(workdir: epath.Path) -> Profile | None:
    """The newest trace of WORKDIR/profile, None if there is none. Raises UserError if it is damaged."""
    paths = list((workdir / workdirs.PROFILE).glob("plugins/profile/*/*.trace.json.gz"))
    if not paths:
        return None
    path = max(paths, key=lambda path: (path.parent.name, path.name))  # the folder is named by its time
    try:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        return Profile(path, sum_operations(events))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a trace of the JAX profiler ({error}); remove it") from error


def sum_operations(events: list[dict[str, Any]]) -> list[Operation]:
    """HLO operations of trace events in Chrome's format, whose times are in microseconds."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    by_thread = defaultdict(list)
    for event in _select_operations(events):
        by_thread[event["pid"], event["tid"]].append(event)
    for thread in by_thread.values():
        for event, time in _compute_own_times(thread):
            name = event.get("args", {}).get("hlo_op", event["name"])
            seconds[name] += time / 1e6
            counts[name] += 1
    totals = [Operation(name, seconds[name], counts[name]) for name in seconds]
    return sorted(totals, key=lambda operation: (-operation.seconds, operation.name))


def _select_operations(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Events of operations, each once.

    An accelerator has a line "XLA Ops", and repeats its operations on lines of streams and of source code. A CPU has
    only the threads that ran them, with other events between.
    """
    lines = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"].get("name") == "XLA Ops"
    }
    accelerators = {pid for pid, _ in lines}
    for event in events:
        if event.get("ph") != "X":
            continue
        if event["pid"] in accelerators:
            if (event["pid"], event["tid"]) in lines:
                yield event
        elif "hlo_op" in event.get("args", {}):
            yield event


def _compute_own_times(events: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event of one thread with its duration less that of the events directly inside it, such as a loop's body."""
    own: list[float] = []
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    enclosing: list[int] = []
    for index, event in enumerate(ordered):
        own.append(event["dur"])
        while enclosing and event["ts"] >= _end(ordered[enclosing[-1]]):
            enclosing.pop()
        if enclosing:
            own[enclosing[-1]] -= event["dur"]
        enclosing.append(index)
    return ((event, max(time, 0.0)) for event, time in zip(ordered, own, strict=True))


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]
