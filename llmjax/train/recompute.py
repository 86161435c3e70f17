"""Compute a step twice and compare all bits of the results (train.recompute_every): wrong bits mean bad hardware."""

import os
from typing import Any

import jax

from llmjax.checkpoint.replicas import device_digests, raise_on_differences
from llmjax.errors import UserError
from llmjax.parallel.backends import CompiledStep
from llmjax.run.config import RunConfig

_DETERMINISTIC = "xla_gpu_deterministic_ops"


def check(config: RunConfig) -> None:
    """Raise UserError where equal hardware would compute different bits, on the mesh of `use_mesh`."""
    platform = jax.sharding.get_mesh().devices.flat[0].platform
    flags = f"{os.environ.get('XLA_FLAGS', '')} {dict(config.xla.flags)}"
    if config.train.recompute_every and platform == "gpu" and _DETERMINISTIC not in flags:
        raise UserError(
            f"train.recompute_every={config.train.recompute_every}: on GPUs, sums by atomic additions differ; "
            f"set the environment variable XLA_FLAGS=--{_DETERMINISTIC}=true, which is slower, or recompute_every=0"
        )


def step_twice(compiled: CompiledStep, state: Any, batch: Any, step: int) -> tuple[Any, dict]:
    """As compiled.step, with the same bits; then the same program runs again on a copy of `state`.

    The copy is made before the program takes the memory of `state`, so the training state exists twice.
    Raises HardwareError, on all processes, naming the devices on which the two results are not equal bit for bit.
    """
    copy = _copy(state)
    state, metrics = compiled.step(state, batch)
    # On CPU, programs that run at the same time would mix up their collectives.
    jax.block_until_ready(state)
    again, _ = compiled.step(copy, batch)
    jax.block_until_ready(again)
    first, second = device_digests(compiled.unshard_state(state)), device_digests(compiled.unshard_state(again))
    raise_on_differences(
        (first != second).nonzero()[0].tolist(), f"step {step} was computed twice, with different results"
    )
    return state, metrics


def _copy(tree: Any) -> Any:
    """The arrays in new memory, each part on its own device."""
    arrays_of = lambda x: [jax.device_put(shard.data, shard.device, may_alias=False) for shard in x.addressable_shards]
    return jax.tree.map(lambda x: jax.make_array_from_single_device_arrays(x.shape, x.sharding, arrays_of(x)), tree)
