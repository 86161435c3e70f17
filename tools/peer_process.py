"""One measured system: trains a small decoder on request and answers with the time of a step.

Requests come as JSON, one a line: first {"system", "config", "device", "document"}, answered after the first step by
{"parameters", "device_kind"}; then {"seconds": s} for the mean seconds of a step over about s seconds, {"matmul": true}
for the flops a second of the best square matrix product (float32 on CPU, bfloat16 on a GPU), or {"memory": true} for
the bytes that training needs at most: the peak of the process's memory in the turns before, beyond its memory when the
framework was imported; 0 where the system does not tell.
"""

from collections.abc import Callable
import ctypes
import functools
import json
import math
import os
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "gpu": (4096, 8192)}


def llmjax_step(
    tree: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, document: int = 0
) -> tuple[Callable, int]:
    """(step, number of parameters); the step is the program that `llmjax train` compiles for this config.

    document   tokens of the documents in a row; 0: a row is one document
    """
    import jax

    from llmjax.batch import Batch
    from llmjax.parallel import axes, backends, hosts, mesh as meshes
    from llmjax.run import config as run_config, state as states
    from llmjax.train.program import make_program

    config = run_config.apply_overrides(tree, [])
    hosts.set_cpu_threads(config.parallel.cpu_threads)  # as `llmjax train` does
    train, mesh = config.train, meshes.make_mesh(config.mesh)
    with axes.use_mesh(mesh, config.parallel.rules):
        spec = states.make_state_spec(config.model, config.optimizer, horizon=train.steps)
        rows = hosts.local_rows(backends.batch_sharding(), train.global_batch)
        compiled = make_program(config, spec, rows, train.global_batch)
        state = compiled.shard_state(states.init_state(spec, config.model, config.seed))
    place = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    document = document or inputs.shape[1]
    batch = Batch(
        inputs=inputs,
        targets=targets,
        weights=np.ones(inputs.shape, np.float32),
        segments=place // document + 1,
        positions=place % document,
        sample=np.stack([np.zeros(len(inputs)), np.arange(len(inputs))], axis=1).astype(np.uint32),
    )

    def step():
        nonlocal state
        with axes.use_mesh(mesh, config.parallel.rules):
            state, metrics = compiled.step(state, compiled.shard_batch(batch))
        return metrics["loss"]

    return step, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec.shapes.params))


def llmjax_matmul(size: int) -> Callable:
    """A square matrix product: float32 on CPU, bfloat16 on a GPU."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (size, size))
    a = a if jax.default_backend() == "cpu" else a.astype(jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a)


def answer_requests() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    answer = lambda **fields: print(json.dumps(fields), file=answers, flush=True)
    first = json.loads(sys.stdin.readline())
    config, device = first["config"], first["device"]
    shape = (config["train"]["global_batch"], config["data"]["seq_len"] + 1)
    tokens = np.random.default_rng(0).integers(0, config["model"]["vocab_size"], shape, np.int32)
    batch = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    if first["system"] == "llmjax":
        import jax

        import llmjax.train.program  # noqa: F401  (for its memory)

        imported = memory()
        step, parameters = llmjax_step(config, *batch, first["document"])
        make_matmul, wait, kind = llmjax_matmul, jax.block_until_ready, jax.devices()[0].device_kind
    else:
        import torch_decoder as peer

        imported = memory()
        compiled, plain = first["system"] == "torch compile", first["system"] == "torch plain"
        step, parameters = peer.make_step(config, *batch, device=device, compiled=compiled, plain_attention=plain)
        make_matmul, wait, kind = functools.partial(peer.make_matmul, device=device), peer.wait, peer.kind(device)
    wait(step())
    answer(parameters=parameters, device_kind=kind)
    forget_peak()
    for request in map(json.loads, sys.stdin):
        if "seconds" in request:
            count = max(1, round(request["seconds"] / mean_seconds(step, wait, 1)))
            answer(step=mean_seconds(step, wait, count))
            continue
        if "memory" in request:
            answer(bytes=max(0, memory("VmHWM") - imported))
            continue
        best = 0.0
        for size in MATMUL_SIZES[device]:
            product = make_matmul(size)
            best = max(best, *(2 * size**3 / mean_seconds(product, wait, 1) for _ in range(3)))
        answer(flops=best)


def memory(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, or with "VmHWM" their peak; 0 where the system has no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def forget_peak() -> None:
    """Let the peak of this process's memory start again, after what compiling has freed was returned to Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def mean_seconds(work: Callable, wait: Callable, count: int) -> float:
    """Mean seconds of `count` consecutive calls, after one that is not timed."""
    result = work()
    wait(result)
    started = time.perf_counter()
    for _ in range(count):
        result = work()
    wait(result)
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    answer_requests()
