"""Sums over a mesh axis in one fixed order, and weights whose gradients are added in it (parallel.reduction).

A sum over 2^n devices first adds the pairs that differ in the lowest bit of their index, then the pairs of those sums,
and so on. All functions that communicate run inside shard_map.
"""

from collections.abc import Callable
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

FSDP, DATA = "fsdp", "data"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """A device's part of a weight that is cut over `fsdp`.

    array   the part; of stacked layers with a leading dimension
    dim     the dimension of the weight that is cut; None: the weight, as a padded vector, is cut
    shape   the shape of the whole weight, of one layer
    """

    array: jax.Array
    dim: int | None = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, part: jax.Array, dim: int | None, *, stacked: bool) -> "Shard":
        """The Shard of an array that is cut along `dim`, or of which all devices have the whole (None)."""
        size, index = jax.lax.axis_size(FSDP), jax.lax.axis_index(FSDP)
        if dim is not None:
            shape = tuple(n * (size if d == dim else 1) for d, n in enumerate(part.shape))
            return cls(part, dim - stacked, shape[stacked:])
        vector = part.reshape(*part.shape[:stacked], -1)
        vector = jnp.pad(vector, [(0, 0)] * stacked + [(0, -vector.shape[-1] % size)])
        length = vector.shape[-1] // size
        return cls(jax.lax.dynamic_slice_in_dim(vector, index * length, length, -1), None, part.shape[stacked:])

    def vector(self) -> jax.Array:
        """The part as a vector, of which `whole` puts a weight together."""
        return (self.array if self.dim is None else jnp.moveaxis(self.array, self.dim, 0)).reshape(-1)

    def whole(self, parts: jax.Array) -> jax.Array:
        """The weight from the vectors of all devices, [devices, length]."""
        if self.dim is None:
            return parts.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)
        rest = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        return jnp.moveaxis(parts.reshape(self.shape[self.dim], *rest), 0, self.dim)


def is_shard(node: Any) -> bool:
    """Whether a node of a tree is a Shard."""
    return isinstance(node, Shard)


def gather_shards(tree: Any) -> Any:
    """`tree` with the whole weight in place of each Shard; the gradients are added over `fsdp`, a part on each device.

    One collective gathers all of them, and so does the backward pass: XLA's CPU backend may start independent
    collectives in another order on each device, and then waits for ever.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_shard)
    shards = [leaf for leaf in leaves if is_shard(leaf)]
    if not shards:
        return tree
    gathered = _gather(jnp.concatenate([shard.vector() for shard in shards]))
    parts = split_at([shard.array for shard in shards], gathered)
    wholes = iter([shard.whole(part) for shard, part in zip(shards, parts, strict=True)])
    return structure.unflatten([next(wholes) if is_shard(leaf) else leaf for leaf in leaves])


def split_at(arrays: list[jax.Array], joined: jax.Array) -> list[jax.Array]:
    """The parts of `joined` [..., total size] that belong to each of `arrays`, whose vectors were concatenated."""
    ends = itertools.accumulate(array.size for array in arrays[:-1])
    return jnp.split(joined, list(ends), axis=-1)


@jax.custom_vjp
def _gather(x: jax.Array) -> jax.Array:
    """The vectors of all devices along `fsdp`: [devices, length]."""
    return jax.lax.all_gather(x, FSDP)


_gather.defvjp(lambda x: (_gather(x), None), lambda _, gradient: (_scatter_sum(gradient, FSDP),))


def _scatter_sum(x: jax.Array, axis: str) -> jax.Array:
    """Part i of the sum over a mesh axis, on device i, of x [devices, ...].

    Each device gets its part from all others and adds them. Recursive halving would send as many bytes, but load the
    links of a torus more (tests/plan/test_tree_cost.py).
    """
    return sum_pairs(jax.lax.all_to_all(x, axis, 0, 0))


def sum_over(axis: str, tree: Any) -> Any:
    """The sums of float32 arrays over a mesh axis of 2^n devices, on all of them; one chain of collectives for all."""
    leaves, structure = jax.tree.flatten(tree)
    leaves, size = [jnp.asarray(leaf, jnp.float32) for leaf in leaves], jax.lax.axis_size(axis)
    vector = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    parts = jnp.pad(vector, (0, -vector.size % size)).reshape(size, -1)
    total = jax.lax.all_gather(_scatter_sum(parts, axis), axis).reshape(-1)[: vector.size]
    pieces = zip(split_at(leaves, total), leaves, strict=True)
    return structure.unflatten([piece.reshape(leaf.shape) for piece, leaf in pieces])


def hidden_loop(count: int, one: jax.Array, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
    """The state after body(0, state), ..., body(count - 1, state).

    one   1, as an array that the compiler cannot see through: it would compile a loop whose length is known to be 1 to
          other instructions

    The scope's name tells the planner the length.
    """
    with jax.named_scope(f"trips_{count}"):
        step = lambda carry: (carry[0] + 1, body(*carry))
        return jax.lax.while_loop(lambda carry: carry[0] < count * one, step, (jnp.int32(0), state))[1]


def sum_micro_steps(compute: Callable[[jax.Array], Any], count: int, one: jax.Array) -> Any:
    """The sum of compute(0), ..., compute(count - 1) in the tree, for count = 2^n, as a binary counter adds them.

    one   as in `hidden_loop`

    It keeps n + 2 results, of which the last is not used: of an array with one entry the compiler would leave out the
    selection, and fuse the rest differently.
    """
    levels = count.bit_length() - 1
    shapes = jax.eval_shape(compute, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros((levels + 2, *s.shape), s.dtype), shapes)

    def body(step, stored):
        total, level = compute(step), jnp.int32(0)
        for bit in range(levels):
            bits = (2 << bit) - 1
            is_complete = (step & bits) == bits  # the pair that differs in this bit
            total = jax.tree.map(lambda s, t, i=bit, add=is_complete: jnp.where(add, s[i] + t, t), stored, total)
            level += is_complete
        return jax.tree.map(lambda s, t: s.at[level].set(t), stored, total)

    return jax.tree.map(lambda s: s[levels], hidden_loop(count, one, body, zeros))


def sum_pairs(x: jax.Array) -> jax.Array:
    """The sum over the first dimension, of 2^n entries, in the tree."""
    while x.shape[0] > 1:
        x = x[0::2] + x[1::2]
    return x[0]
