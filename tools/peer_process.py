"""One measured system: trains a small decoder on request and answers with the time of a step.

Requests come as JSON, one a line: first {"system", "config", "device"}, answered after the first step by {"parameters",
"device_kind"}; then {"seconds": s} for the mean seconds of a step over about s seconds, or {"matmul": true} for the
flops a second of the best square matrix product (float32 on CPU, bfloat16 on a GPU).
"""

from collections.abc import Callable
import functools
import json
import math
import os
import sys
import time
from typing import Any

import numpy as np

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "gpu": (4096, 8192)}


def llmjax_step(tree: dict[str, Any], inputs: np.ndarray, targets: np.ndarray) -> tuple[Callable, int]:
    """(step, number of parameters); the step is the program that `llmjax train` compiles for this config."""
    import jax

    from llmjax.batch import Batch
    from llmjax.parallel import axes, backends, hosts, mesh as meshes
    from llmjax.run import config as run_config, state as states
    from llmjax.train.step import make_loss, train_step

    config = run_config.apply_overrides(tree, [])
    train, mesh = config.train, meshes.make_mesh(config.mesh)
    with axes.use_mesh(mesh, config.parallel.rules):
        spec = states.make_state_spec(config.model, config.optimizer, horizon=train.steps)
        rows = hosts.local_rows(backends.batch_sharding(), train.global_batch)
        loss = make_loss(spec.graph, seed=config.seed, chunk=train.loss_chunk, z_loss=train.z_loss)
        step_function = functools.partial(
            train_step, loss=loss, optimizer=spec.optimizer, accumulation=train.accumulation
        )
        compiled = backends.compile_step(
            step_function, config.parallel.backend, spec.shardings, rows, train.global_batch
        )
        state = compiled.shard_state(states.init_state(spec, config.model, config.seed))
    batch = Batch(
        inputs=inputs,
        targets=targets,
        weights=np.ones(inputs.shape, np.float32),
        segments=np.ones(inputs.shape, np.int32),
        positions=np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape),
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

        step, parameters = llmjax_step(config, *batch)
        make_matmul, wait, kind = llmjax_matmul, jax.block_until_ready, jax.devices()[0].device_kind
    else:
        import torch_decoder as peer

        step, parameters = peer.make_step(config, *batch, device=device, compiled=first["system"] == "torch compile")
        make_matmul, wait, kind = functools.partial(peer.make_matmul, device=device), peer.wait, peer.kind(device)
    wait(step())
    answer(parameters=parameters, device_kind=kind)
    for request in map(json.loads, sys.stdin):
        if "seconds" in request:
            count = max(1, round(request["seconds"] / mean_seconds(step, wait, 1)))
            answer(step=mean_seconds(step, wait, count))
            continue
        best = 0.0
        for size in MATMUL_SIZES[device]:
            product = make_matmul(size)
            best = max(best, *(2 * size**3 / mean_seconds(product, wait, 1) for _ in range(3)))
        answer(flops=best)


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
