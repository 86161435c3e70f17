"""Rows of tools/bench_curate.py: whole runs of `llmjax curate`, by the clock, on more workers, on Ray, on more data."""

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

_IDLE = 0.3  # processors that others may use before a row says so
_CURATE = "import sys; from llmjax.cli.main import main; sys.exit(main())"
_POLL = 0.05  # seconds between looks at the memory


def scaling_rows(bench: Bench) -> Iterator[Row]:
    """A whole run with one worker and with two. Every worker has loaded what it needs before."""
    with tempfile.TemporaryDirectory() as folder, _every_core():
        config, others = _corpora(bench, Path(folder)), _Others()
        seconds = {}
        for workers in (1, 2):
            with LocalRunner(workers) as runner:
                seconds[workers] = _seconds(config, runner, Path(folder), bench.run_repeats)
        yield Row("whole run, MB/s by the clock, 1 worker", f"{bench.run_megabytes / seconds[1]:.2f}")
        yield Row(f"  2 workers are faster{others.told()}", f"{seconds[1] / seconds[2]:.2f}x", "", "1.8x")


def ray_rows(bench: Bench) -> Iterator[Row]:
    """A whole run on Ray, two nodes of one process each on this machine, beside two local processes."""
    try:
        import ray.cluster_utils
    except ImportError:
        yield Row("Ray on 2 nodes, times local", "not installed", "", "1.3x")
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder, _every_core():
        config, others = _corpora(bench, Path(folder)), _Others()
        with LocalRunner(2) as runner:
            local = _seconds(config, runner, Path(folder), bench.run_repeats)
        told = others.told()  # now: the processes of Ray are not told from those of others
        began = time.monotonic()
        cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        try:
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            with RayRunner(str(cluster.address)) as runner:
                list(runner.map(abs, [(0,), (1,)]))
                started = time.monotonic() - began
                there = _seconds(config, runner, Path(folder), bench.run_repeats)
        finally:
            cluster.shutdown()
        yield Row(f"Ray on 2 nodes, times local on 2{told}", f"{there / local:.2f}x", "", "1.3x")
        yield Row("  to start both nodes and the first task, s", f"{started:.1f}")


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Resident memory of `llmjax curate` with two workers, at its highest, on the data and on ten times as much."""
    peaks = []
    with tempfile.TemporaryDirectory() as folder, _every_core():
        for times in (1, 10):
            path = Path(folder) / f"{times}.jsonl"
            grow(bench.texts, bench.memory_megabytes * times, path)
            command = [sys.executable, "-c", _CURATE, "curate", f"--config={ROOT / 'configs' / 'curate.py'}"]
            command += [f"--workdir={folder}/run-{times}", f"--config.curate.inputs.python.path={path}"]
            peaks.append(_peak([*command, "--config.curate.workers=2"]))
    names = ("all processes together", "the largest process", "the largest worker's", "the one that decides")
    for name, small, large in zip(names, *peaks, strict=True):
        target = "1.3x" if name == names[0] else ""
        ratio = f"{large / small:.2f}x"
        yield Row(f"memory, {name}: {small / 1e6:.0f} and {large / 1e6:.0f} MB", ratio, "", target)


class Peak(NamedTuple):
    """Bytes."""

    together: int
    largest: int
    worker: int
    driver: int


def _peak(command: list[str]) -> Peak:
    """Stops the program where the command fails."""
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    reading = threading.Thread(target=lambda: said.extend(done.stdout or ()))
    reading.start()
    together = worker = driver = 0
    while done.poll() is None:
        sizes = {number: _resident(number) for number in (done.pid, *_children(done.pid))}
        together = max(together, sum(now for now, _ in sizes.values()))
        driver = max(driver, sizes.pop(done.pid)[1])
        worker = max([worker, *(most for _, most in sizes.values())])
        time.sleep(_POLL)
    reading.join()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed\n{''.join(said[-20:])}")
    return Peak(together, max(worker, driver), worker, driver)


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _resident(process: int) -> tuple[int, int]:
    """Bytes that a process has now, and had at most; without pages of files, which the system takes back at need."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        now = (int(lines["RssAnon"].split()[0]) + int(lines["RssShmem"].split()[0])) * 1024
        return now, int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):  # it has ended
        return 0, 0


def _corpora(bench: Bench, folder: Path) -> dict[str, CurateConfig]:
    """The corpus that counts, and a small one of four parts, on which every process loads what it needs."""
    grow(bench.texts, 0.05, folder / "small.jsonl")
    grow(bench.texts, bench.run_megabytes, folder / "large.jsonl")
    small, large = (InputConfig(path=str(folder / f"{name}.jsonl")) for name in ("small", "large"))
    return {
        "small": CurateConfig(inputs={f"part{number}": small for number in range(4)}),
        "large": CurateConfig(inputs={"web": large}),
    }


def grow(texts: list[str], megabytes: float, path: Path) -> None:
    """JSONL of new documents: paragraphs of all texts, drawn at random, as many as a text has."""
    draw = random.Random(0)
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    left, number = megabytes * 1e6, 0
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            count = min(draw.choice(texts).count("\n\n") + 1, 200)
            text = "\n\n".join(draw.choice(paragraphs) for _ in range(count))
            left -= file.write(json.dumps({"id": f"{number}", "text": text}, ensure_ascii=False) + "\n")
            number += 1


def _seconds(configs: dict[str, CurateConfig], runner: Runner, folder: Path, repeats: int) -> float:
    """By the clock, the least of some runs; the first run, on next to nothing, is not counted."""
    times = []
    for name in ("small", *["large"] * repeats):
        with tempfile.TemporaryDirectory(dir=folder) as workdir:
            began = time.monotonic()
            curate.curate(configs[name], Path(workdir), runner)
            times.append(time.monotonic() - began)
    return min(times[1:])


@contextlib.contextmanager
def _every_core() -> Iterator[None]:
    """Rows of one core pin this process to it; these use all."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Others:
    """What else the machine does from now on: time of its processors that is not ours."""

    def __init__(self):
        self._began, self._busy = time.monotonic(), _busy() - _ours()

    def told(self) -> str:
        """To be said in a row, once our processes have ended: nothing where the machine was idle but for us."""
        used = (_busy() - _ours() - self._busy) / (time.monotonic() - self._began)
        return f" (others used {used:.1f} cores)" if used > _IDLE else ""


def _busy() -> float:
    """Seconds of processor time of the whole machine."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _ours() -> float:
    """The same of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])
