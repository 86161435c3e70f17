"""Compile the train step with one of two backends: jit shards it by the rules, pmap maps it over replicas."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.errors import UserError
from llmjax.parallel import axes, hosts
from llmjax.parallel.mesh import ParallelConfig


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What a step must know of how its batch is cut: under jit it sees the whole batch, under pmap one replica's rows.

    all_sum     a tree of sums over this piece -> the same sums over the whole batch
    first_row   rows in this piece -> index of its first row in the global batch
    """

    all_sum: Callable[[Any], Any]
    first_row: Callable[[int], Any]


JIT = Reduction(all_sum=lambda tree: tree, first_row=lambda rows: 0)
PMAP = Reduction(
    all_sum=lambda tree: jax.lax.psum(tree, "replica"),
    first_row=lambda rows: (jax.lax.axis_index("replica") * rows).astype(jnp.uint32),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step with its two doors.

    step    (state, batch) -> (state, metrics); takes the state that `place` gave and donates it
    place   global state -> the arrays that `step` takes
    lift    the state that `step` gave -> global arrays, as checkpoints and evaluation take them
    feed    this process's rows of a batch (numpy) -> the batch that `step` takes
    """

    step: Callable
    shard_state: Callable
    unshard_state: Callable
    shard_batch: Callable


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every axis that splits the batch."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def check_batch(name: str, size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raise UserError where `size` rows cannot be cut evenly over the mesh and the microbatches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % (shards * accumulation):
        parts = f"mesh.data x mesh.fsdp = {shards}" + (
            f" x train.accumulation = {accumulation}" if accumulation > 1 else ""
        )
        near = max(size // (shards * accumulation), 1) * shards * accumulation
        raise UserError(f"{name}={size} is not divisible by {parts}: take {near}, or change the mesh")


def check_backend(config: ParallelConfig, mesh: Mesh) -> None:
    """Raise UserError for an unknown compiler, or one that cannot honour the mesh."""
    if config.backend not in ("jit", "pmap"):
        raise UserError(f"parallel.backend={config.backend!r}: known are 'jit' and 'pmap'")
    wide = {name: size for name, size in mesh.shape.items() if name != "data" and size > 1}
    if config.backend == "pmap" and wide:
        raise UserError(
            f"parallel.backend='pmap' replicates the state, so it can't honour mesh {wide}: set them to 1 or use 'jit'"
        )


def compile_step(
    step: Callable, config: ParallelConfig, mesh: Mesh, state_shardings: Any, rows: np.ndarray, batch: int
) -> Compiled:
    """Compile `step(state, batch, shards=...)` as `config.backend` says. `rows` are this process's rows of `batch`."""
    check_backend(config, mesh)
    if config.backend == "pmap":
        return _compile_pmap(step, mesh)
    return _compile_jit(step, mesh, config.rules, state_shardings, rows, batch)


def _compile_jit(
    step: Callable, mesh: Mesh, rules: axes.LogicalRules, state_shardings: Any, rows: np.ndarray, batch: int
) -> Compiled:
    data, replicated = batch_sharding(mesh), NamedSharding(mesh, P())
    compiled = jax.jit(
        lambda state, batch: step(state, batch, reduction=JIT),
        in_shardings=(state_shardings, data),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )

    def sharded(state, batch):
        with jax.set_mesh(mesh), axes.use_rules(rules):
            return compiled(state, batch)

    same = lambda state: state
    # A process that holds the whole batch hands jit the numpy arrays: it cuts and places them faster than we could.
    spread = lambda local: hosts.global_batch(data, local, rows, batch)
    return Compiled(sharded, same, same, same if jax.process_count() == 1 else spread)


def _compile_pmap(step: Callable, mesh: Mesh) -> Compiled:
    devices = jax.local_devices()
    here = NamedSharding(Mesh(np.array(devices), ("replica",)), P())
    everywhere = NamedSharding(mesh, P())
    mapped = jax.pmap(
        lambda state, batch: step(state, batch, reduction=PMAP),
        axis_name="replica",
        in_axes=(None, 0),
        out_axes=(None, None),
        donate_argnums=0,
    )

    # Placing before the first call matters: a donated state that pmap had to copy itself would be deleted under it.
    def place(state):
        return jax.tree.map(lambda x: jax.device_put(x.addressable_shards[0].data, here), state)

    # pmap gives host-local arrays; the same buffers, seen as one array over all processes, are what the rest takes.
    def lift(state):
        return jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(
                x.shape, everywhere, [shard.data for shard in x.addressable_shards]
            ),
            state,
        )

    def feed(local):
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), local)

    return Compiled(mapped, place, lift, feed)
