"""Rows of tools/bench_curate.py on complete runs of `llmjax curate`: scaling with workers, Ray, memory."""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import random
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

from curate_rows import ROOT, Bench, Row

from llmjax.curate.config import CurateConfig, InputConfig
from llmjax.curate.engine import curate
from llmjax.curate.engine.runners import LocalRunner, RayRunner, Runner

_MAX_OTHER_CORES = 0.3  # cores that other processes may use before a row says so
_CURATE = "import sys; from llmjax.cli.main import main; sys.exit(main())"
_POLL = 0.05  # seconds between readings of the memory


def scaling_rows(bench: Bench) -> Iterator[Row]:
    """A complete run with one worker and with two. The workers have loaded their modules before."""
    with tempfile.TemporaryDirectory() as folder, _all_cores():
        configs, others = _make_corpora(bench, Path(folder)), _OtherLoad()
        seconds = {}
        for workers in (1, 2):
            with LocalRunner(workers) as runner:
                seconds[workers] = _best_seconds(configs, runner, Path(folder), bench.run_repeats)
        yield Row("complete run, MB/s of wall time, 1 worker", f"{bench.run_megabytes / seconds[1]:.2f}")
        yield Row(f"  speedup with 2 workers{others.describe()}", f"{seconds[1] / seconds[2]:.2f}x", "", "1.8x")


def ray_rows(bench: Bench) -> Iterator[Row]:
    """A complete run on Ray with two nodes of one process on this machine, compared with two local processes."""
    try:
        import ray.cluster_utils
    except ImportError:
        yield Row("Ray on 2 nodes, relative to 2 local processes", "not installed", "", "1.3x")
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder, _all_cores():
        configs, others = _make_corpora(bench, Path(folder)), _OtherLoad()
        with LocalRunner(2) as runner:
            local = _best_seconds(configs, runner, Path(folder), bench.run_repeats)
        load = others.describe()  # before Ray starts, whose processes would count as others
        begin = time.monotonic()
        cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        try:
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            with RayRunner(str(cluster.address)) as runner:
                list(runner.map(abs, [(0,), (1,)]))
                startup = time.monotonic() - begin
                on_ray = _best_seconds(configs, runner, Path(folder), bench.run_repeats)
        finally:
            cluster.shutdown()
        yield Row(f"Ray on 2 nodes, relative to 2 local processes{load}", f"{on_ray / local:.2f}x", "", "1.3x")
        yield Row("  startup of the nodes and the first task, s", f"{startup:.1f}")


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Peak resident memory of `llmjax curate` with two workers, on a corpus and on one ten times as large."""
    peaks = []
    with tempfile.TemporaryDirectory() as folder, _all_cores():
        for factor in (1, 10):
            path = Path(folder) / f"{factor}.jsonl"
            write_corpus(bench.texts, bench.memory_megabytes * factor, path)
            command = [sys.executable, "-c", _CURATE, "curate", f"--config={ROOT / 'configs' / 'curate.py'}"]
            command += [f"--workdir={folder}/run-{factor}", f"--config.curate.inputs.python.path={path}"]
            peaks.append(_measure_peak([*command, "--config.curate.workers=2"]))
    names = ("all processes", "largest process", "largest worker", "main process")
    for name, small, large in zip(names, *peaks, strict=True):
        target = "1.3x" if name == names[0] else ""
        ratio = f"{large / small:.2f}x"
        yield Row(f"memory, {name}: {small / 1e6:.0f} and {large / 1e6:.0f} MB", ratio, "", target)


class Peak(NamedTuple):
    """Peak bytes; `total` is of all processes at the same time."""

    total: int
    process: int
    worker: int
    main: int


def _measure_peak(command: list[str]) -> Peak:
    """Exits if the command fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
    reader.start()
    total = worker = main = 0
    while process.poll() is None:
        sizes = {pid: _resident_bytes(pid) for pid in (process.pid, *_children(process.pid))}
        total = max(total, sum(now for now, _ in sizes.values()))
        main = max(main, sizes.pop(process.pid)[1])
        worker = max([worker, *(peak for _, peak in sizes.values())])
        time.sleep(_POLL)
    reader.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed\n{''.join(output[-20:])}")
    return Peak(total, max(worker, main), worker, main)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _resident_bytes(pid: int) -> tuple[int, int]:
    """(current, peak) of a process. The current value excludes pages of files, which the system can reclaim."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        now = (int(lines["RssAnon"].split()[0]) + int(lines["RssShmem"].split()[0])) * 1024
        return now, int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):  # it has ended
        return 0, 0


def _make_corpora(bench: Bench, folder: Path) -> dict[str, CurateConfig]:
    """The measured corpus, and a small one of four parts for warm-up."""
    write_corpus(bench.texts, 0.05, folder / "small.jsonl")
    write_corpus(bench.texts, bench.run_megabytes, folder / "large.jsonl")
    small, large = (InputConfig(path=str(folder / f"{name}.jsonl")) for name in ("small", "large"))
    return {
        "small": CurateConfig(inputs={f"part{number}": small for number in range(4)}),
        "large": CurateConfig(inputs={"web": large}),
    }


def write_corpus(texts: list[str], megabytes: float, path: Path) -> None:
    """Write JSON lines of documents from random paragraphs of all texts, with as many paragraphs as the texts have."""
    rng = random.Random(0)
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    remaining, number = megabytes * 1e6, 0
    with open(path, "w", encoding="utf-8") as file:
        while remaining > 0:
            count = min(rng.choice(texts).count("\n\n") + 1, 200)
            text = "\n\n".join(rng.choice(paragraphs) for _ in range(count))
            remaining -= file.write(json.dumps({"id": f"{number}", "text": text}, ensure_ascii=False) + "\n")
            number += 1


def _best_seconds(configs: dict[str, CurateConfig], runner: Runner, folder: Path, repeats: int) -> float:
    """The least wall time of several runs, after a run on the small corpus."""
    times = []
    for name in ("small", *["large"] * repeats):
        with tempfile.TemporaryDirectory(dir=folder) as workdir:
            begin = time.monotonic()
            curate.curate(configs[name], Path(workdir), runner)
            times.append(time.monotonic() - begin)
    return min(times[1:])


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Undo the pinning of this process to one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _OtherLoad:
    """The load of other processes on this machine, since this object was created."""

    def __init__(self):
        self._begin, self._seconds = time.monotonic(), _machine_seconds() - _own_seconds()

    def describe(self) -> str:
        """A note for a row, "" if other processes used little. Call it after own subprocesses have ended."""
        used = (_machine_seconds() - _own_seconds() - self._seconds) / (time.monotonic() - self._begin)
        return f" (others used {used:.1f} cores)" if used > _MAX_OTHER_CORES else ""


def _machine_seconds() -> float:
    """Processor time of all processes of this machine."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor time of this process and of its ended subprocesses."""
    return sum(os.times()[:4])
