"""Attention over rows whose positions are split over devices: keys and values are gathered, queries stay.

Each device computes its own queries against all keys of the row. (Llama Team, 2024, arXiv 2407.21783, section 3.3.2)
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.parallel import axes


def num_shards(length: int) -> int:
    """The number of devices that share the positions of a row of `length`; 1: its attention is not split."""
    shards = axes.num_shards("seq")
    return shards if length % (2 * shards) == 0 else 1


def split_rows(
    attention_fn: Callable[..., jax.Array],
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    mask: Any,
    mask_axes: Callable[[Any], Any],
    *,
    sinks: jax.Array | None,
    bias: jax.Array | None,
    bias_axes: Sequence[str | None],
    reorder_queries: Callable[[Any, Sequence[int]], Any] | None,
) -> jax.Array:
    """`attention_fn(q, k, v, mask, sinks=, bias=)` in a shard_map over the mesh; the result is laid out like q.

    arrays           q [batch, s, heads, head_dim], k and v [batch, t, kv_heads, head_dim]
    mask_axes        mask -> the logical axes of each of its arrays, where "seq" stands for queries
    bias_axes        those of the bias
    reorder_queries  (mask, order) -> the mask for queries that were cut into len(order) chunks and put into this order,
                     or None where that would balance nothing; None: the kernel does not skip masked scores

    In causal attention a query sees the keys before it, so that equal runs of queries would be unequal work. With
    `reorder_queries` device i of n takes chunks i and 2 n - 1 - i of 2 n, whose sum is the same for all i: queries are
    exchanged before and after the attention. Memory and collectives of a layer hold whole keys and values of a row.
    """
    q, k, v = arrays
    mesh_axes = axes.mesh_axes_of("seq")
    shards = num_shards(q.shape[1])
    order = _balanced_order(shards)
    balanced = reorder_queries(mask, order) if reorder_queries and q.shape[1] == k.shape[1] else None
    mask = mask if balanced is None else balanced
    # Groups of query heads stay with the key head that they share.
    (heads,) = axes.spec(("kv_heads",), (k.shape[2],))
    rows, seq = axes.spec(("batch", "seq"), q.shape[:2])
    (key_seq,) = axes.spec(("seq",), (k.shape[1],))
    spec = lambda x, names: axes.spec(names, x.shape)

    def local(q, k, v, mask, sinks, bias):
        if key_seq is not None:
            k, v = (jax.lax.all_gather(x, mesh_axes, axis=1, tiled=True) for x in (k, v))
        if balanced is None:
            return attention_fn(q, k, v, mask, sinks=sinks, bias=bias)
        exchange = functools.partial(_exchange, order=order, mesh_axes=mesh_axes)
        return exchange(attention_fn(exchange(q), k, v, mask, sinks=sinks, bias=bias), inverse=True)

    return jax.shard_map(
        local,
        in_specs=(
            P(rows, seq, heads),
            P(rows, key_seq, heads),
            P(rows, key_seq, heads),
            jax.tree.map(spec, mask, mask_axes(mask)),
            None if sinks is None else P(heads),
            None if bias is None else spec(bias, bias_axes),
        ),
        out_specs=P(rows, seq, heads),
        check_vma=False,
    )(q, k, v, mask, sinks, bias)


def _balanced_order(shards: int) -> list[int]:
    """The chunks of all devices, two each: first the one of even number, so that `_exchange` is two permutations."""
    pairs = ((i, 2 * shards - 1 - i) for i in range(shards))
    return [chunk for pair in pairs for chunk in sorted(pair, key=lambda chunk: chunk % 2)]


def _exchange(x: jax.Array, *, order: Sequence[int], mesh_axes: tuple[str, ...], inverse: bool = False) -> jax.Array:
    """x [batch, local seq, ...]: from two consecutive chunks of the row to the device's two chunks of `order`.

    A device holds chunks 2 i and 2 i + 1 and receives one even and one odd chunk, so the even ones are one permutation
    of the devices and the odd ones another.
    """
    halves = []
    for parity, half in enumerate(jnp.split(x, 2, axis=1)):
        moves = [(chunk // 2, owner) for owner, chunk in enumerate(order[parity::2])]
        if inverse:
            moves = [(owner, source) for source, owner in moves]
        halves.append(jax.lax.ppermute(half, mesh_axes, moves))
    return jnp.concatenate(halves, axis=1)
