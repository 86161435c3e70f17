#!/usr/bin/env python3
"""Measure training on CPU: tokens a second beside PyTorch, start to first step, and the host's work for a step.

python tools/bench_train.py                everything: about 20 minutes on 2 cores
python tools/bench_train.py --quick        the quickstart's shape alone, short turns: about 4 minutes
python tools/bench_train.py --only=speed   one part

speed   a step of `llmjax train` (forward, backward, clip at 1.0, AdamW, and the checks that every step makes) and the
        same decoder in plain PyTorch, float32, each in a process of its own. They take turns, so that the load of the
        machine affects all. The table shows the median turn and the range of all turns. The limit is the fastest
        square matrix product of any system; a share of it counts the flops that the model needs. llmjax masks packed
        documents, and PyTorch uses a causal mask alone, its fastest case. Memory is the peak of a process in its first
        turn, beyond that of the imported framework. The long rows are measured as one document and as documents of 512
        tokens, with llmjax's blockwise attention. PyTorch's attention is its fused kernel; long rows are also measured
        with "torch plain", eager PyTorch with matmul, softmax and matmul instead. The column "of llmjax" is the time of
        a step over llmjax's; in the limit's line it shows how much faster any system could be.
start   `llmjax train --config=configs/quickstart.py` as a process, until step 1 is logged, with the text prepared
        before: with an empty compilation cache, and with the one that this start filled.
tree    a step with parallel.reduction="fixed_tree" beside one with "xla", on 1 and on 8 emulated devices (mesh.fsdp) of
        the same cores: what the same bits on any number of devices cost. They take turns.
host    the work of the host for a step of 12 very narrow layers, while the device is idle: read and log the metrics
        of the previous step, fetch the next batch, shard it, dispatch. A longer step of the device hides all of it.
"""

import argparse
from collections.abc import Callable
import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

from etils import epath
import jax
import numpy as np
from peers import INSTALL_TORCH, LONG_ROW_SYSTEMS, SYSTEMS, compare, environment, load, resolve_config

from llmjax.batch import Batch
from llmjax.data.batches.pipeline import TrainData
from llmjax.parallel import axes, backends, hosts, mesh as meshes
from llmjax.run import state as states
from llmjax.run.config import RunConfig
from llmjax.train import loop
from llmjax.train.program import make_program

CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.py")
LONG = {"data.seq_len": 2048, "train.global_batch": 1, "model.attention": "blockwise"}
LARGER = {"model.num_layers": 6, "model.embed": 384, "model.num_heads": 6, "model.mlp": 1024}
NARROW = {"model.num_layers": 12, "model.embed": 8, "model.num_heads": 1, "model.mlp": 8}
VOCAB_SIZE = 4096  # the quickstart's
WARMUP = 10  # steps of a run before its times count
PARTS = ("speed", "start", "tree", "host")
SHARDS = 8  # parallel.virtual_shards, and the most devices


def main() -> None:
    options = parse_options()
    os.environ.update(environment("cpu"))
    jax.config.update("jax_platforms", "cpu")
    if "speed" in options.only:
        shapes = [("quickstart", {}, 0)]
        if not options.quick:
            shapes += [("larger", LARGER, 0), ("long rows", LONG, 0), ("long rows, packed", LONG, 512)]
        for name, overrides, document in shapes:
            compare(
                name,
                resolve_config(CONFIG, overrides, VOCAB_SIZE),
                turns=options.turns,
                seconds=options.seconds,
                device="cpu",
                document=document,
                systems=LONG_ROW_SYSTEMS if overrides is LONG else SYSTEMS,
            )
    if "tree" in options.only:
        tree(options.turns, options.seconds)
    with tempfile.TemporaryDirectory(prefix="llmjax-bench-") as folder:
        store = f"{folder}/store"
        if {"start", "host"} & set(options.only) and llmjax("prepare", Path(folder), {"data.store": store}).wait():
            sys.exit("preparing the quickstart's text failed; see its output above")
        if "start" in options.only:
            start(Path(folder), store, 1 if options.quick else 3)
        if "host" in options.only:
            host(Path(folder) / "host", store, 50 if options.quick else 300)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{INSTALL_TORCH}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns, one shape")
    parser.add_argument("--turns", type=int, help="turns of each system (default: 9, or 3 with --quick)")
    parser.add_argument("--seconds", type=float, help="length of a turn (default: 4, or 2 with --quick)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated (default: %(default)s)")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only={','.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    options.turns = options.turns or (3 if options.quick else 9)
    options.seconds = options.seconds or (2 if options.quick else 4)
    return options


def start(folder: Path, store: str, repeats: int) -> None:
    """Seconds from the start of the process to the first step's metrics, with an empty cache and with a filled one."""
    print(f"\nstart of the quickstart to its first step, text prepared, median of {repeats}, {load()}")
    cold, warm = [], []
    for index in range(repeats):
        for times, name in ((cold, "cold"), (warm, "warm")):
            workdir, cache = folder / f"{name}{index}", f"{folder}/cache{index}"
            began = time.perf_counter()
            process = llmjax(
                "train", workdir, {"data.store": store, "train.compilation_cache": cache, "train.log_every": 1}
            )
            metrics = workdir / "metrics.jsonl"
            while not metrics.exists() or not metrics.stat().st_size:
                if process.poll() is not None:
                    sys.exit(f"llmjax train ended with status {process.returncode}; see its output above")
                time.sleep(0.01)
            times.append(time.perf_counter() - began)
            process.kill()
            process.wait()
    for name, times, limit in (("empty compilation cache", cold, 15), ("filled compilation cache", warm, 8)):
        row(name, f"{statistics.median(times):.1f} s", f"< {limit} s", f"{min(times):.1f} to {max(times):.1f} s")


def tree(turns: int, seconds: float) -> None:
    """The cost of parallel.reduction="fixed_tree"."""
    print(
        f"\na step with parallel.reduction='fixed_tree' of {SHARDS} virtual shards, median of {turns} turns, {load()}"
    )
    spawn = multiprocessing.get_context("spawn")  # its devices are set before JAX starts
    for devices in (1, SHARDS):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            xla, fixed = pool.submit(time_reductions, devices, turns, seconds).result()
        ratios = [100 * (b / a - 1) for a, b in zip(xla, fixed, strict=True)]
        row(
            f"{devices} device{'s' * (devices > 1)}",
            f"{1e3 * statistics.median(fixed):.1f} ms",
            "",
            f"xla {1e3 * statistics.median(xla):.1f} ms: {statistics.median(ratios):+.0f}%, "
            f"turns from {min(ratios):+.0f}% to {max(ratios):+.0f}%",
        )


def time_reductions(devices: int, turns: int, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of a step of the quickstart's shape in each turn, with "xla" and with "fixed_tree"."""
    jax.config.update("jax_num_cpu_devices", SHARDS)
    rows, times = {"train.global_batch": 2 * SHARDS}, ([], [])
    modes = ({}, {"parallel.reduction": "fixed_tree", "parallel.virtual_shards": SHARDS})
    configs = [resolve_config(CONFIG, rows | mode, VOCAB_SIZE) for mode in modes]
    hosts.set_cpu_threads(configs[0].parallel.cpu_threads)  # as `llmjax train` does
    with axes.use_mesh(meshes.make_mesh(meshes.MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])):
        steps = [make_step(config) for config in configs]
        for turn in range(turns + 1):  # the first one compiles
            for step, of_mode in zip(steps, times, strict=True):
                began, count = time.perf_counter(), 0
                while time.perf_counter() - began < seconds:
                    step()
                    count += 1
                if turn:
                    of_mode.append((time.perf_counter() - began) / count)
    return times


def make_step(config: RunConfig) -> Callable[[], Any]:
    """A function that trains one step, always on the same rows, and waits for it."""
    size, shape = config.train.global_batch, (config.train.global_batch, config.data.seq_len)
    spec = states.make_state_spec(config.model, config.optimizer, horizon=config.train.steps)
    program = make_program(config, spec, hosts.local_rows(backends.batch_sharding(), size), size)
    state = states.init_state(spec, config.model, config.seed)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, shape).astype(np.int32)
    ones, place = np.ones(shape, np.int32), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    sample = np.stack([np.zeros(size), np.arange(size)], axis=1).astype(np.uint32)
    batch = Batch(
        inputs=tokens, targets=tokens, weights=ones.astype(np.float32), segments=ones, positions=place, sample=sample
    )

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(program.step(state, program.shard_batch(batch))[0])

    return step


def llmjax(name: str, workdir: Path, overrides: dict[str, Any]) -> subprocess.Popen:
    """Start a command on the quickstart's config, without its output."""
    command = [sys.executable, "-c", "from llmjax.cli.main import main; main()", name]
    command += [f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in overrides.items())]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


class Clock:
    """Times the parts of the training loop by wrapping the functions that it calls; waits for each step."""

    def __init__(self, steps: int):
        self.parts: dict[str, list[float]] = {"read and log": [], "next batch": [], "shard batch": [], "dispatch": []}
        self._steps_left, self._ready, self._between = steps, 0.0, 0.0

    def part(self, name: str, function: Callable) -> Callable:
        """`function`, timed as that part of the step."""

        def timed(*arguments):
            began = time.perf_counter()
            result = function(*arguments)
            seconds = time.perf_counter() - began
            self.parts[name].append(seconds)
            self._between += seconds
            return result

        return timed

    def step(self, function: Callable) -> Callable:
        """The compiled step. The time since the last step that no other part took is that of reading and logging."""
        dispatch = self.part("dispatch", function)

        def timed(state, batch):
            self.parts["read and log"].append(time.perf_counter() - self._ready - self._between)
            result = jax.block_until_ready(dispatch(state, batch))
            self._steps_left -= 1
            if not self._steps_left:
                raise AllStepsTimed
            self._ready, self._between = time.perf_counter(), 0.0
            return result

        return timed


class AllStepsTimed(Exception):
    """Ends the training loop after the last step that is timed."""


def host(workdir: Path, store: str, steps: int) -> None:
    """The host's work for a step, part by part, in `llmjax train` itself."""
    print(f"\nhost's work for a step, {NARROW['model.num_layers']} layers, median of {steps} steps, {load()}")
    clock = Clock(steps + WARMUP)
    config = resolve_config(CONFIG, NARROW | {"data.store": store}, VOCAB_SIZE)
    compile_step, batches = backends.compile_step, TrainData.batches

    def timed_compile_step(*arguments):
        real = compile_step(*arguments)
        return dataclasses.replace(
            real, step=clock.step(real.step), shard_batch=clock.part("shard batch", real.shard_batch)
        )

    def timed_batches(*arguments):
        next_batch = clock.part("next batch", batches(*arguments).__next__)
        while True:
            yield next_batch()

    with (
        mock.patch.object(backends, "compile_step", timed_compile_step),
        mock.patch.object(TrainData, "batches", timed_batches),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(AllStepsTimed),
    ):
        loop.train(config, epath.Path(workdir))
    parts = {name: np.array(times[WARMUP:]) * 1e3 for name, times in clock.parts.items()}
    for name, times in (parts | {"together": sum(parts.values())}).items():
        limit = "< 2 ms" if name == "together" else ""
        row(name, f"{np.median(times):.3f} ms", limit, f"99 of 100 below {np.quantile(times, 0.99):.3f} ms")


def row(name: str, ours: str, limit: str, what: str) -> None:
    print(f"  {name:28}{ours:>12}{limit:>12}   {what}", flush=True)


if __name__ == "__main__":
    main()
