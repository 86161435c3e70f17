"""Compile the train step with one of two backends: jit shards it by the rules, pmap maps it over replicas."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.errors import UserError
from llmjax.parallel import axes, hosts


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How a step sums over the whole batch: under jit it sees all rows, under pmap those of one replica.

    all_sum       a tree of sums over the step's rows -> the same sums over the whole batch
    sum_gradients the same for gradients, which are added in `axes.gradient_dtype`
    first_row     number of the step's rows -> index of its first row in the global batch
    """

    all_sum: Callable[[Any], Any]
    sum_gradients: Callable[[Any], Any]
    first_row: Callable[[int], Any]


def _psum_gradients(grads: Any) -> Any:
    cast = jax.tree.map(lambda g: g.astype(axes.gradient_dtype(g.dtype)), grads)
    return jax.tree.map(lambda total, g: total.astype(g.dtype), jax.lax.psum(cast, "replica"), grads)


JIT = Reduction(all_sum=lambda tree: tree, sum_gradients=lambda grads: grads, first_row=lambda rows: 0)
PMAP = Reduction(
    all_sum=lambda tree: jax.lax.psum(tree, "replica"),
    sum_gradients=_psum_gradients,
    first_row=lambda rows: (jax.lax.axis_index("replica") * rows).astype(jnp.uint32),
)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiled train step, and conversions between its arrays and the global arrays of other code.

    step            (state, batch) -> (state, metrics); takes what `shard_state` and `shard_batch` return, donates state
    shard_state     global state -> the arrays that `step` takes
    unshard_state   the state that `step` returned -> global arrays, as checkpoints and evaluation take them
    shard_batch     this process's rows of a batch (numpy) -> the batch that `step` takes
    """

    step: Callable
    shard_state: Callable
    unshard_state: Callable
    shard_batch: Callable


def batch_sharding() -> NamedSharding:
    """Rows over every mesh axis that splits the batch."""
    return NamedSharding(jax.sharding.get_mesh(), axes.spec(("batch",)))


def check_batch(name: str, size: int, accumulation: int = 1) -> None:
    """Raise UserError where `size` rows cannot be cut evenly over the mesh and the microbatches."""
    shards = axes.num_shards("batch")
    if size % (shards * accumulation):
        divisor = " x ".join(f"mesh.{axis}" for axis in axes.mesh_axes_of("batch")) + f" = {shards}"
        if accumulation > 1:
            divisor += f" x train.accumulation = {accumulation}"
        near = max(size // (shards * accumulation), 1) * shards * accumulation
        raise UserError(f"{name}={size} is not divisible by {divisor}: set it to {near}, or change the mesh")


def check_length(name: str, length: int) -> None:
    """Raise UserError where rows of `length` positions cannot be cut into two equal parts for each device."""
    shards = axes.num_shards("seq")
    if shards > 1 and length % (2 * shards):
        divisor = "2 x " + " x ".join(f"mesh.{axis}" for axis in axes.mesh_axes_of("seq")) + f" = {2 * shards}"
        near = max(length // (2 * shards), 1) * 2 * shards
        raise UserError(f"{name}={length} is not divisible by {divisor}: set it to {near}, or change the mesh")


def check_backend(backend: str) -> None:
    """Raise UserError for an unknown backend, and for one that does not support the mesh."""
    if backend not in ("jit", "pmap"):
        raise UserError(f"parallel.backend={backend!r}: expected 'jit' or 'pmap'")
    mesh = jax.sharding.get_mesh()
    sharded = {name: size for name, size in mesh.shape.items() if name != "data" and size > 1}
    if backend == "pmap" and sharded:
        raise UserError(
            f"parallel.backend='pmap' replicates the state and does not support mesh {sharded}: set these axes to 1, "
            "or use 'jit'"
        )


def compile_step(
    step: Callable,
    backend: str,
    state_shardings: Any,
    rows: np.ndarray,
    batch: int,
    options: Mapping[str, str | bool] | None = None,
) -> CompiledStep:
    """Compile `step(state, batch, reduction=...)` for the mesh.

    rows     this process's rows of `batch` rows
    options  of XLA's compiler, for `jit`; pmap has no argument for them
    """
    check_backend(backend)
    return _compile_pmap(step) if backend == "pmap" else _compile_jit(step, state_shardings, rows, batch, options or {})


def _compile_jit(
    step: Callable, state_shardings: Any, rows: np.ndarray, batch: int, options: Mapping[str, str | bool]
) -> CompiledStep:
    data, replicated = batch_sharding(), NamedSharding(jax.sharding.get_mesh(), P())

    def train_step(state, batch):  # profiles, dumps and the compiled module show this name
        return step(state, batch, reduction=JIT)

    compiled = jax.jit(
        train_step,
        in_shardings=(state_shardings, data),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=dict(options),
    )
    unchanged = lambda tree: tree
    # A process that holds the whole batch passes the numpy arrays to jit, which shards them faster than this code.
    shard_batch = lambda local: hosts.global_batch(data, local, rows, batch)
    return CompiledStep(compiled, unchanged, unchanged, unchanged if jax.process_count() == 1 else shard_batch)


def _compile_pmap(step: Callable) -> CompiledStep:
    devices = jax.local_devices()
    local = NamedSharding(Mesh(np.array(devices), ("replica",)), P())
    replicated = NamedSharding(jax.sharding.get_mesh(), P())
    mapped = jax.pmap(
        lambda state, batch: step(state, batch, reduction=PMAP),
        axis_name="replica",
        in_axes=(None, 0),
        out_axes=(None, None),
        donate_argnums=0,
    )
    no_mesh = Mesh(np.empty((), object), ())

    def step_without_mesh(state, batch):
        with jax.set_mesh(no_mesh):  # pmap creates its own mesh and refuses to run inside another one
            return mapped(state, batch)

    # The state is put on the devices before the first call: pmap would delete a donated state that it has to copy.
    def shard_state(state):
        return jax.tree.map(lambda x: jax.device_put(x.addressable_shards[0].data, local), state)

    # pmap returns host-local arrays; other code takes the same buffers as one array over all processes.
    def unshard_state(state):
        return jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(
                x.shape, replicated, [shard.data for shard in x.addressable_shards]
            ),
            state,
        )

    def shard_batch(rows):
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), rows)

    return CompiledStep(step_without_mesh, shard_state, unshard_state, shard_batch)
