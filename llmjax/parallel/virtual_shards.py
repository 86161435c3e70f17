"""Sums over the virtual shards of a batch, with the same bits on any number of devices (parallel.virtual_shards).

The global batch is cut into V virtual shards of one shape (parallel.virtual_shards). The bits of a shard's number are,
from the lowest one, those of its index along `fsdp`, of its micro-step, and of its index along `data`; all sums add
the shards in the binary tree over this number. On data x fsdp = D devices, each runs V / D micro-steps one after
another. The backward pass of the gather of each layer adds the bits of `fsdp`, so that a device holds the whole
gradient of one layer at most. Micro-steps then add sharded gradients, and the replicas along `data` are added last,
once a step. EasyScale (Li et al., SC 2023, arXiv 2208.14228) has the same aim for data parallelism.

What a device computes must also be compiled to the same instructions on any layout. Hence all loops run over arrays of
one shape, a number of times that the compiler does not know.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.batch import Batch, Params
from llmjax.errors import UserError
from llmjax.parallel import axes
from llmjax.parallel.fixed_tree import DATA, FSDP, Shard, gather_shards, sum_micro_steps, sum_over
from llmjax.parallel.mesh import ParallelConfig


def refusal(field: str, why: str) -> UserError:
    """The error for a field that the mode does not support."""
    return UserError(f"{field}: parallel.reduction='fixed_tree' {why}")


def check(parallel: ParallelConfig, name: str, batch: int) -> None:
    """Raise UserError where the mesh of `use_mesh` or a batch (of a field `name`) does not suit the virtual shards."""
    mesh, shards = jax.sharding.get_mesh().shape, parallel.virtual_shards
    devices = mesh[DATA] * mesh[FSDP]
    for axis, size in mesh.items():
        if size > 1 and axis not in (DATA, FSDP):
            raise refusal(f"mesh.{axis}={size}", "sums over data and fsdp alone; set it to 1")
    if devices & (devices - 1) or devices > shards:
        near = min(1 << (devices.bit_length() - 1), shards)
        raise refusal(
            f"mesh.data x mesh.fsdp={devices}",
            f"needs a power of two up to parallel.virtual_shards={shards}; use {near} devices",
        )
    if batch % shards:
        raise refusal(
            f"{name}={batch}", f"cuts it into parallel.virtual_shards={shards} equal parts; set it to a multiple"
        )
    if parallel.rules != axes.DEFAULT_RULES:
        raise refusal("parallel.rules", "needs the default rules; set it to ()")


def compiler_options() -> dict[str, str]:
    """Options that programs need: on CPU, the compiler would merge equal parts of a rematerialised block and of its
    backward pass, on one device in other places than on several."""
    return {"xla_disable_hlo_passes": "cse"} if axes.device().platform == "cpu" else {}


def hidden_one(not_negative: jax.Array) -> jax.Array:
    """1, which the compiler does not know; from an integer that is never negative."""
    return jnp.minimum(not_negative, 0) + 1


def fsdp_dim(spec: P) -> int | None:
    """The dimension that a spec cuts over `fsdp`; None where there is none."""
    cut = [dim for dim, entry in enumerate(spec) if FSDP in (entry if isinstance(entry, tuple) else (entry,))]
    return cut[0] if cut else None


def names_of(axes: Params) -> list[tuple[str | None, ...]]:
    """The logical axes of each parameter."""
    return jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))


def specs_of(shardings: Any) -> list[P]:
    """The spec of each leaf."""
    return [sharding.spec for sharding in jax.tree.leaves(shardings)]


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` in a shard_map over all axes of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(mesh.axis_names), check_vma=False
    )


def make_gradients(loss: Callable, axes: Params, shardings: Params, virtual_shards: int) -> Callable:
    """A function (params, batch) -> (gradients, sums) that adds the virtual shards in the tree.

    loss              (params, batch) -> (what is differentiated, tree of sums over rows)
    axes, shardings   of the parameters
    """

    def compute(merge: Callable, arrays: list[jax.Array], rows: Batch):
        return jax.grad(lambda arrays: loss(merge(arrays), rows), has_aux=True)(arrays)

    specs = specs_of(shardings)
    run = _make(compute, axes, specs, virtual_shards, specs)

    def gradients(params: Params, batch: Batch) -> tuple[Params, Any]:
        grads, sums = run(params, batch)
        return jax.tree.structure(params).unflatten(grads), sums

    return gradients


def make_sums(score: Callable, axes: Params, shardings: Params, virtual_shards: int) -> Callable:
    """A function (params, batch) -> sums that adds those of the virtual shards in the tree.

    score   (params, batch) -> tree of sums over rows
    """
    compute = lambda merge, arrays, rows: ([], score(merge(arrays), rows))
    run = _make(compute, axes, specs_of(shardings), virtual_shards, [])
    return lambda params, batch: run(params, batch)[1]


def _make(compute: Callable, axes: Params, specs: list[P], virtual_shards: int, out_specs: list[P]) -> Callable:
    """A function (params, batch) -> (gradients, sums), for one (merge, parts of weights, rows of a virtual shard) ->
    (gradients of the parts or [], sums), where merge(parts) are parameters."""
    is_stacked = [names[:1] == ("layers",) for names in names_of(axes)]

    def run(params: Params, batch: Batch) -> tuple[list[jax.Array], Any]:
        shape = jax.sharding.get_abstract_mesh().shape
        data, fsdp = shape[DATA], shape[FSDP]
        count = virtual_shards // (data * fsdp)
        leaves, structure = jax.tree.flatten(params)

        def to_shards(x: jax.Array) -> jax.Array:
            # [batch, ...] -> [data, micro-steps, fsdp, rows of a virtual shard, ...]; tokens move between devices here
            x = x.reshape(data, count, fsdp, -1, *x.shape[1:])
            return jax.lax.with_sharding_constraint(x, P(DATA, None, FSDP))

        def of_device(leaves: list[jax.Array], batch: Batch) -> tuple[list[jax.Array], Any]:
            batch = jax.tree.map(lambda x: x.reshape(count, *x.shape[3:]), batch)
            shards = [
                Shard.of(leaf, fsdp_dim(spec), stacked=stacked)
                for leaf, spec, stacked in zip(leaves, specs, is_stacked, strict=True)
            ]

            def merge(arrays: list[jax.Array]) -> Params:
                parts = [dataclasses.replace(shard, array=array) for shard, array in zip(shards, arrays, strict=True)]
                # Stacked layers are gathered one by one, where they are used (nn.stack).
                single = [part for part, stacked in zip(parts, is_stacked, strict=True) if not stacked]
                whole = iter(gather_shards(single))
                return structure.unflatten(
                    [part if stacked else next(whole) for part, stacked in zip(parts, is_stacked, strict=True)]
                )

            def of_micro_step(step: jax.Array):
                rows = jax.tree.map(lambda x: x[step], batch)
                grads, sums = compute(merge, [shard.array for shard in shards], rows)
                return grads, sum_over(FSDP, sums)

            one = hidden_one(batch.inputs[0, 0, 0])
            grads, sums = sum_over(DATA, sum_micro_steps(of_micro_step, count, one))
            return [_unshard(*item) for item in zip(grads, shards, leaves, strict=bool(grads))], sums

        return on_each_device(of_device, (specs, P(DATA, None, FSDP)), (out_specs, P()))(
            leaves, jax.tree.map(to_shards, batch)
        )

    return run


def _unshard(grad: jax.Array, shard: Shard, leaf: jax.Array) -> jax.Array:
    """The gradient as the parameter is laid out: as it is if it is cut, else the whole on all devices."""
    if shard.dim is not None:
        return grad
    vector = jax.lax.all_gather(grad, FSDP, axis=grad.ndim - 1, tiled=True)
    return vector[..., : leaf.size // (leaf.shape[0] if grad.ndim == 2 else 1)].reshape(leaf.shape)
