"""Compile a config's train step for a machine that need not be present, in a child process.

The TPU compiler writes the optimized program and its buffers after seconds, and then generates code for minutes. No API
stops in between: the child compiles with XLA's dump on, and the quick depth ends it once the memory report is complete.
The full depth waits for the scheduled program, in which the compiler has priced each instruction in cycles.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import pickle
import re
import subprocess
import sys
import time

from llmjax.errors import UserError
from llmjax.plan import compile_child, topology as topologies
from llmjax.plan.topology import Topology
from llmjax.run.config import RunConfig

logger = logging.getLogger(__name__)

_MODULE = "jit_train_step"
_OTHER_PLATFORMS = ("--xla_cpu_", "--xla_gpu_")
_POLL_SECONDS, _SETTLED_SECONDS = 0.2, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a program on one device.

    arguments    the state and the batch
    temporaries  everything else at its peak
    host         in the memory of the device's host
    """

    arguments: int
    temporaries: int
    host: int = 0

    @property
    def total(self) -> int:
        """Peak of arguments and temporaries."""
        return self.arguments + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A step compiled for a machine.

    optimized       text of the optimized program
    scheduled       text of the finished program with the compiler's cycles; "" in the quick depth, and where the
                    program does not fit
    out_of_memory   whether the compiler refused it for want of memory
    memory          bytes of one device
    largest         (bytes, shapes) of the largest buffers, largest first
    mesh            size of each mesh axis
    slice_of        partition of the program -> its slice
    parameters      of the model
    parameter_bytes, optimizer_bytes, teacher_bytes   the state of one device; 0 without distill.teacher
    seconds         that the compiler took
    device_memory   bytes that a GPU reports as its limit; None for other platforms
    hops            axis of the mesh -> links of a TPU's torus, as tree_cost.TreeCost has them
    """

    optimized: str
    scheduled: str
    out_of_memory: bool
    memory: Memory
    largest: list[tuple[int, str]]
    mesh: dict[str, int]
    slice_of: list[int]
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    seconds: float
    teacher_bytes: int = 0
    device_memory: int | None = None
    hops: dict[str, float] = dataclasses.field(default_factory=dict)


def compile_ahead(config: RunConfig, topology: Topology, folder: pathlib.Path, *, quick: bool) -> Program:
    """Compile the step in a child process that writes its files into the empty `folder`.

    Raises UserError where the config does not suit the machine. A step that does not fit its memory is a result.
    """
    topologies.check_installed(topology)
    started = time.monotonic()
    dump = folder / "dump"
    with _child(config, topology, folder, dump) as child:
        while child.poll() is None:
            if quick and topology.platform == "tpu" and _is_complete(dump):
                break
            time.sleep(_POLL_SECONDS)
    out_of_memory = _is_out_of_memory(folder, dump)
    if not out_of_memory:
        _raise_error(folder, dump, child.returncode, child.pid)
    facts = json.loads((folder / compile_child.FACTS).read_text())
    if topology.platform == "tpu":
        optimized, scheduled = _read(dump, "after_optimizations"), _read(dump, "after_codegen", missing="")
        memory, largest = read_buffers(_read(dump, "after_optimizations-buffer-assignment"))
    else:
        optimized, scheduled, largest = (folder / compile_child.OPTIMIZED).read_text(), "", []
        memory = Memory(**json.loads((folder / compile_child.MEMORY).read_text()))
    return Program(
        optimized=optimized,
        scheduled=scheduled,
        out_of_memory=out_of_memory,
        memory=memory,
        largest=largest,
        seconds=time.monotonic() - started,
        **facts,
    )


@contextlib.contextmanager
def _child(config: RunConfig, topology: Topology, folder: pathlib.Path, dump: pathlib.Path):
    """The compiling process; it is ended at the end of the block, if it still runs."""
    environment = dict(os.environ)
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program that comes from a cache is not dumped
    if topology.platform != "gpu":
        environment["JAX_PLATFORMS"] = "cpu"
    if topology.platform == "tpu":
        environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_large_constants"
        # The TPU compiler ends the process at a flag of another platform that it does not know.
        given = [flag for flag in environment.get("XLA_FLAGS", "").split() if not flag.startswith(_OTHER_PLATFORMS)]
        environment["XLA_FLAGS"] = f"{' '.join(given)} {flags} --xla_dump_hlo_module_re={_MODULE}.*"
    with (folder / "stderr.txt").open("wb") as stderr, (folder / "stdout.txt").open("wb") as stdout:
        command = [sys.executable, "-m", compile_child.__name__]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=environment)
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it failed at an import: its stderr says why
                child.stdin.write(pickle.dumps((config, topology, folder)))
                child.stdin.close()
            yield child
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()


def _is_complete(dump: pathlib.Path) -> bool:
    """Whether program and memory report are written: a later file exists, or they stay as they are."""
    reports = list(dump.glob(f"*{_MODULE}*after_optimizations-memory-usage-report.txt"))
    programs = list(dump.glob(f"*{_MODULE}*after_optimizations.txt"))
    if not reports or not programs or not programs[0].stat().st_size:
        return False
    if list(dump.glob(f"*{_MODULE}*after_optimizations_after_buffer_assignment.txt")):
        return True
    return time.time() - max(path.stat().st_mtime for path in (*reports, *programs)) > _SETTLED_SECONDS


def _raise_error(folder: pathlib.Path, dump: pathlib.Path, status: int, pid: int) -> None:
    """Raise the child's error, if it failed before it was ended."""
    if (path := folder / compile_child.ERROR).exists():
        raise UserError(json.loads(path.read_text())["error"])
    if status == 0 or _is_complete(dump):
        return
    text = (folder / "stderr.txt").read_text(errors="replace")
    raise RuntimeError(f"process {pid}, which compiled the step, ended with status {status}:\n{text[-4000:]}")


def _is_out_of_memory(folder: pathlib.Path, dump: pathlib.Path) -> bool:
    """Whether the TPU compiler planned all buffers and then refused the program for want of memory."""
    planned = list(dump.glob(f"*{_MODULE}*after_optimizations-buffer-assignment.txt"))
    return bool(planned) and "RESOURCE_EXHAUSTED" in (folder / "stderr.txt").read_text(errors="replace")


def _read(dump: pathlib.Path, stage: str, *, missing: str | None = None) -> str:
    files = list(dump.glob(f"*{_MODULE}*.{stage}.txt"))
    if not files and missing is not None:
        return missing
    return files[0].read_text()


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*):$")
_VALUE = re.compile(r"^ value: <[^>]*> \(size=(\d+),offset=(\d+)\): ([^{ ]*)")


def read_buffers(text: str) -> tuple[Memory, list[tuple[int, str]]]:
    """Memory, and the largest buffers, from XLA's dump of a buffer assignment.

    Buffers of an asynchronous computation (thread-local) are parts of others, and the report's total counts them twice.
    """
    arguments = temporaries = host = 0
    slots: dict[tuple[int, int], dict[str, None]] = {}
    color, is_temporary = 0, False
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            size, rest = int(match[1]), match[2]
            written = re.search(r"\bcolor (\d+)", rest)
            color, is_temporary = int(written[1]) if written else 0, "preallocated-temp" in rest
            if "thread-local" in rest:
                color = -1
            elif color == 0 and "parameter" in rest:
                arguments += size
            elif color == 0:
                temporaries += size
            elif color == _HOST_COLOR:
                host += size
        elif color == 0 and is_temporary and (match := _VALUE.match(line)):
            slots.setdefault((int(match[1]), int(match[2])), {})[match[3]] = None
    largest = sorted(((size, ", ".join(shapes)) for (size, _), shapes in slots.items()), reverse=True)[:8]
    return Memory(arguments=arguments, temporaries=temporaries, host=host), largest


_HOST_COLOR = 5
