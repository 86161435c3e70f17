"""Attention computed block by block: memory linear in the sequence length, in plain JAX, on every platform.

The scores of a block of queries with a block of keys are computed, used and dropped. The softmax is corrected when a
larger score arrives, and the backward pass computes the scores again from the saved logarithm of the softmax's sum.
(Online softmax: Milakov & Gimelshein, 2018, arXiv 1805.02867; attention in linear memory: Rabe & Staats, 2021, arXiv
2112.05682; the backward pass: Dao et al., 2022, FlashAttention, arXiv 2205.14135.)
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from llmjax.nn import context_parallel
from llmjax.nn.attention import one_segment
from llmjax.nn.embedding import MASKED

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

# Queries and keys of a block. The float32 scores of one block are batch x heads x BLOCK x BLOCK x 4 bytes.
BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which keys a query sees, without an array of queries x keys. Lengths are multiples of the blocks.

    segments, positions          int [batch, s], of the queries
    key_segments, key_positions  int [batch, t]
    prefix                       bool [batch, t]: keys that also earlier queries see; None: no key
    window                       int []: only keys less than this many positions away are seen
    index                        int [query blocks]: the place of each block of queries in the row
    first, last                  int [query blocks]: block i needs the key blocks from first[i] to last[i] - 1
    block, key_block             queries and keys of a block
    """

    segments: jax.Array
    positions: jax.Array
    key_segments: jax.Array
    key_positions: jax.Array
    prefix: jax.Array | None
    window: jax.Array
    index: jax.Array
    first: jax.Array
    last: jax.Array
    block: int = dataclasses.field(metadata={"static": True})
    key_block: int = dataclasses.field(metadata={"static": True})


class _Options(NamedTuple):
    """Static arguments of the kernel, as in `nn.attention.dot`."""

    scale: float
    softcap: float | None


class _Inputs(NamedTuple):
    """Arguments of the kernel that have gradients.

    q      [batch, padded s, groups, repeats, head_dim]
    k, v   [batch, padded t, groups, head_dim]
    sinks  float32 [groups, repeats]
    bias   float32 [groups, repeats, 2 padded s - 1]
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None
    bias: jax.Array | None


def block_mask(
    segments: jax.Array | None,
    positions: jax.Array,
    *,
    causal: bool,
    prefix: jax.Array | None = None,
    window: int | None = None,
    block: int = 0,
) -> BlockMask:
    """The BlockMask that allows what `nn.attention.attention_mask` allows for the same arguments.

    Segments must be contiguous and positions count up by one inside them, so that blocks can be left out by their
    place in the row; only padding (segment 0), whose result nobody reads, may be otherwise. Sequences are padded to a
    multiple of `block` (0: BLOCK) by tokens of a segment of their own.
    """
    block = _block_size(positions.shape[1], block or BLOCK)
    if segments is None:
        segments, positions = one_segment(positions)
    segments, positions = _pad(segments, block, -1), _pad(positions, block, 0)
    if not causal:
        prefix = jnp.ones(segments.shape, bool)
    elif prefix is not None:
        prefix = _pad(prefix, block, False)
    window = segments.shape[1] if window is None else window
    index, ranges = jnp.arange(segments.shape[1] // block), _key_ranges(segments, prefix, window, block)
    return BlockMask(segments, positions, segments, positions, prefix, jnp.int32(window), index, *ranges, block, block)


def cross_block_mask(segments: jax.Array, key_segments: jax.Array, *, block: int = 0) -> BlockMask:
    """The BlockMask of queries [batch, s] that see the keys [batch, t] of their segment; padding (0) sees none.

    Segments must be in ascending order, apart from padding.
    """
    query_block, key_block = (_block_size(x.shape[1], block or BLOCK) for x in (segments, key_segments))
    segments, key_segments = _pad(segments, query_block, 0), _pad(key_segments, key_block, 0)
    segments = jnp.where(segments == 0, -1, segments)
    by_block = segments.reshape(segments.shape[0], -1, query_block)
    highest = jnp.max(by_block, axis=2, keepdims=True)
    lowest = jnp.min(jnp.where(by_block > 0, by_block, highest), axis=2, keepdims=True)
    keys = key_segments[:, None, :]
    needed = jnp.any((keys >= lowest) & (keys <= highest), axis=0)
    key_block_index = jnp.arange(key_segments.shape[1]) // key_block
    first = jnp.min(jnp.where(needed, key_block_index, key_block_index[-1]), axis=1)
    last = jnp.max(jnp.where(needed, key_block_index + 1, 0), axis=1)
    at_zero, key_at_zero = jnp.zeros_like(segments), jnp.zeros_like(key_segments)
    everywhere, window, index = jnp.ones(key_segments.shape, bool), jnp.int32(1), jnp.arange(by_block.shape[1])
    return BlockMask(
        segments, at_zero, key_segments, key_at_zero, everywhere, window, index, first, last, query_block, key_block
    )


def mask_axes(mask: BlockMask) -> BlockMask:
    """The logical axes of each array of a BlockMask; "seq" is that of the queries."""
    queries, keys = ("batch", "seq"), ("batch", None)
    return dataclasses.replace(
        mask,
        segments=queries,
        positions=queries,
        key_segments=keys,
        key_positions=keys,
        prefix=None if mask.prefix is None else keys,
        window=(),
        index=("seq",),
        first=("seq",),
        last=("seq",),
    )


def reorder_queries(mask: BlockMask, order: Sequence[int]) -> BlockMask | None:
    """The mask for queries that were cut into len(order) equal chunks and put into this order; None if not causal."""
    if mask.prefix is not None:
        return None

    def reorder(x: jax.Array) -> jax.Array:
        chunks = x.reshape(*x.shape[:-1], len(order), -1)
        return chunks[..., np.array(order), :].reshape(x.shape)

    names = ("segments", "positions", "index", "first", "last")
    return dataclasses.replace(mask, **{name: reorder(getattr(mask, name)) for name in names})


def _block_size(length: int, block: int) -> int:
    """`block`, or less for a short row. If devices share the positions of a row, blocks divide the chunks of each."""
    shards = context_parallel.num_shards(length)
    if shards == 1:
        return min(block, length)
    chunk = length // (2 * shards)
    return chunk if chunk <= block else math.gcd(chunk, block)


def _pad(x: jax.Array, block: int, value: int | bool) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=value)


def _key_ranges(segments: jax.Array, prefix: jax.Array | None, window: int, block: int) -> tuple[jax.Array, jax.Array]:
    """BlockMask.first and .last: one range for all rows, since they are computed together."""
    batch, seq = segments.shape
    at = jnp.arange(seq)
    is_start = jnp.diff(segments, axis=1, prepend=-2) != 0
    is_end = jnp.roll(is_start, -1, axis=1).at[:, -1].set(True)
    start = jax.lax.cummax(jnp.where(is_start, at, 0), axis=1)
    end = jax.lax.cummin(jnp.where(is_end, at, seq), axis=1, reverse=True)
    lowest = jnp.maximum(start, at - (window - 1))
    highest = jnp.broadcast_to(at, end.shape) if prefix is None else jnp.minimum(end, at + (window - 1))
    by_block = lambda bound: bound.reshape(batch, seq // block, block)
    first = jnp.min(by_block(lowest), axis=(0, 2)) // block
    last = jnp.max(by_block(highest), axis=(0, 2)) // block + 1
    return first, last


def blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: BlockMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention with the result of `nn.attention.dot`, to rounding; 0 for a query that sees no key.

    Shapes and arguments as in `dot`, except for the mask, which is from `block_mask` or `cross_block_mask`, and the
    bias: float32 [heads, 2 s - 1], that of each distance (key minus query) from 1 - s to s - 1. The output and the
    logarithm of the softmax's sum carry the checkpoint name "attention", so that a remat policy can keep them.
    """
    batch, seq, heads, head_dim = q.shape
    groups, repeats = k.shape[2], heads // k.shape[2]
    options = _Options(head_dim**-0.5 if scale is None else scale, softcap)
    pad = lambda x, like: jnp.pad(x, ((0, 0), (0, like.shape[1] - x.shape[1]), (0, 0), (0, 0)))
    if bias is not None:
        padding = mask.segments.shape[1] - seq
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 0), (padding, padding))).reshape(groups, repeats, -1)
    inputs = _Inputs(
        pad(q, mask.segments).reshape(batch, -1, groups, repeats, head_dim),
        pad(k, mask.key_segments),
        pad(v, mask.key_segments),
        None if sinks is None else sinks.astype(jnp.float32).reshape(groups, repeats),
        bias,
    )
    out: jax.Array = _attention(options, inputs, mask)
    return out.reshape(batch, -1, heads, v.shape[-1])[:, :seq]


def _query_block(x: jax.Array, query: jax.Array, block: int) -> jax.Array:
    """Block `query` of x [batch, padded s, groups, repeats, width]: [batch, groups, repeats * block, width].

    The heads of a group lie behind one another, so that one matmul serves them all.
    """
    rows = jax.lax.dynamic_slice_in_dim(x, query * block, block, axis=1).transpose(0, 2, 3, 1, 4)
    return rows.reshape(*rows.shape[:2], -1, x.shape[-1])


def _query_rows(x: jax.Array, block: int) -> jax.Array:
    """The inverse of `_query_block` for one block: [batch, block, groups, repeats, width]."""
    batch, groups, rows, width = x.shape
    return x.reshape(batch, groups, rows // block, block, width).transpose(0, 3, 1, 2, 4)


def _join_rows(x: jax.Array) -> jax.Array:
    """Rows of all blocks, [blocks, batch, block, groups, repeats, width], as [batch, padded s, ...]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _key_blocks(x: jax.Array, block: int) -> jax.Array:
    """x [batch, padded t, groups, width] as [blocks, batch, groups, block, width], in which a block is contiguous."""
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _join_columns(x: jax.Array) -> jax.Array:
    """The inverse of `_key_blocks` for transposed blocks [blocks, batch, groups, width, block]."""
    x = x.transpose(1, 0, 4, 2, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _scores(
    options: _Options,
    q: jax.Array,
    k: jax.Array,
    bias: jax.Array | None,
    mask: BlockMask,
    query: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Masked float32 scores [batch, groups, repeats * block, key_block] of query block `query` and key block `key`.

    q [batch, groups, repeats * block, head_dim], k [batch, groups, key_block, head_dim]. Also returns the derivative of
    the soft-cap, None without one.
    """
    scores = options.scale * _product("bgsk,bgtk->bgst", q, k)
    slope = None
    if options.softcap is not None:
        capped = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * capped, 1 - capped**2
    if bias is not None:
        start = _first_distance(bias, mask.block, mask.index[query], key)
        near = jax.lax.dynamic_slice_in_dim(bias, start, 2 * mask.block - 1, axis=2)
        scores += _matrix_from_diagonals(near).reshape(q.shape[1:3] + k.shape[2:3])
    cut = lambda x, index, size: jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)
    queries, keys = lambda x: cut(x, query, mask.block)[:, :, None], lambda x: cut(x, key, mask.key_block)[:, None, :]
    distance = queries(mask.positions) - keys(mask.key_positions)
    past = distance >= 0
    visible = queries(mask.segments) == keys(mask.key_segments)
    visible &= past if mask.prefix is None else past | keys(mask.prefix)
    visible &= jnp.abs(distance) < mask.window
    repeats = q.shape[2] // mask.block
    return jnp.where(jnp.tile(visible, (1, repeats, 1))[:, None], scores, MASKED), slope


def _first_distance(bias: jax.Array, block: int, query: jax.Array, key: jax.Array) -> jax.Array:
    """Index in `bias` of the smallest of the 2 block - 1 distances between query block `query` and key block `key`."""
    return bias.shape[2] // 2 + 1 - block + (key - query) * block


def _matrix_from_diagonals(diagonals: jax.Array) -> jax.Array:
    """[..., 2 n - 1] -> [..., n, n] whose element (i, j) is diagonal n - 1 + j - i; by reshapes, without a gather."""
    size = (diagonals.shape[-1] + 1) // 2
    # Rows of 2 n - 1 read as rows of 2 n: each begins one diagonal later than the one before.
    flat = jnp.tile(diagonals, size + 1)[..., : 2 * size * size]
    return flat.reshape(*diagonals.shape[:-1], size, 2 * size)[..., ::-1, :size]


def _sum_diagonals(matrix: jax.Array) -> jax.Array:
    """The transpose of `_matrix_from_diagonals`: [..., n, n] -> [..., 2 n - 1]."""
    size = matrix.shape[-1]
    wide = jnp.pad(matrix[..., ::-1, :], [(0, 0)] * (matrix.ndim - 1) + [(0, size)])
    flat = wide.reshape(*matrix.shape[:-2], -1)[..., : size * (2 * size - 1)]
    return jnp.sum(flat.reshape(*matrix.shape[:-2], size, 2 * size - 1), axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, inputs: _Inputs, mask: BlockMask) -> jax.Array:
    """The output in the layout of q: [batch, padded s, groups, repeats, v's head_dim]."""
    return _forward(options, inputs, mask)[0]


def _forward(options: _Options, inputs: _Inputs, mask: BlockMask) -> tuple[jax.Array, jax.Array]:
    """The output, and the logarithm of the softmax's sum, float32 [blocks, batch, groups, repeats * block, 1]."""
    q, k, v, sinks, bias = inputs
    k_blocks, v_blocks = _key_blocks(k, mask.key_block), _key_blocks(v, mask.key_block)
    batch, _, groups, repeats, _ = q.shape
    rows = (batch, groups, repeats * mask.block, 1)
    highest, total = jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)
    if sinks is not None:  # as a key that every query sees and whose value is 0
        highest = jnp.broadcast_to(jnp.repeat(sinks, mask.block, axis=1).reshape(1, groups, -1, 1), rows)
        total = jnp.ones(rows, jnp.float32)

    def query_block(_, item):
        query, first, last = item
        q_block = _query_block(q, query, mask.block)

        def key_block(key, carry):
            out, highest, total = carry
            scores, _ = _scores(options, q_block, k_blocks[key], bias, mask, query, key)
            new = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
            correction, weights = jnp.exp(highest - new), jnp.exp(scores - new)
            values = _product("bgst,bgtk->bgsk", weights.astype(v.dtype), v_blocks[key])
            total = correction * total + jnp.sum(weights, axis=-1, keepdims=True)
            return correction * out + values, new, total

        out = jnp.zeros((*rows[:-1], v.shape[-1]), jnp.float32)
        out, new, sums = jax.lax.fori_loop(first, last, key_block, (out, highest, total))
        sees_none = new == MASKED
        out = jnp.where(sees_none, 0, out / jnp.where(sees_none, 1, sums)).astype(v.dtype)
        # The backward pass computes weights as exp(score - log_total): 0 for a query that sees no key.
        return None, (_query_rows(out, mask.block), jnp.where(sees_none, -MASKED, new + jnp.log(sums)))

    out, log_total = jax.lax.scan(query_block, None, (jnp.arange(len(mask.first)), mask.first, mask.last))[1]
    return _join_rows(out), log_total


def _attention_forward(options: _Options, inputs: _Inputs, mask: BlockMask) -> tuple[jax.Array, tuple[Any, ...]]:
    out, log_total = (checkpoint_name(x, "attention") for x in _forward(options, inputs, mask))
    return out, (inputs, mask, out, log_total)


def _attention_backward(
    options: _Options, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[_Inputs, BlockMask | None]:
    inputs, mask, out, log_total = saved
    q, k, v, sinks, bias = inputs
    k_blocks, v_blocks = _key_blocks(k, mask.key_block), _key_blocks(v, mask.key_block)
    # The sum over keys of a weight times its gradient, which the softmax's gradient subtracts (Dao et al., section 3).
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def query_block(carry, item):
        query, first, last, log_total = item
        q_block, d_out_block, mean_block = (_query_block(x, query, mask.block) for x in (q, d_out, mean))
        q_columns, d_out_columns = q_block.swapaxes(2, 3), d_out_block.swapaxes(2, 3)

        def key_block(key, carry):
            d_q, d_k, d_v, d_bias = carry
            k_block = k_blocks[key]
            scores, slope = _scores(options, q_block, k_block, bias, mask, query, key)
            weights = jnp.exp(scores - log_total)
            d_scores = weights * (_product("bgsk,bgtk->bgst", d_out_block, v_blocks[key]) - mean_block)
            if bias is not None:
                by_head = jnp.sum(d_scores, axis=0).reshape(*bias.shape[:2], mask.block, mask.key_block)
                start = _first_distance(bias, mask.block, mask.index[query], key)
                d_bias = _add_slice(d_bias, _sum_diagonals(by_head), start)
            d_scores = (d_scores * options.scale if slope is None else d_scores * options.scale * slope).astype(q.dtype)
            d_q += _product("bgst,bgtk->bgsk", d_scores, k_block)
            d_k = _add_block(d_k, _product("bgks,bgst->bgkt", q_columns, d_scores), key)
            d_v = _add_block(d_v, _product("bgks,bgst->bgkt", d_out_columns, weights.astype(d_out.dtype)), key)
            return d_q, d_k, d_v, d_bias

        d_q, *carry = jax.lax.fori_loop(first, last, key_block, (jnp.zeros(q_block.shape, jnp.float32), *carry))
        return tuple(carry), _query_rows(d_q.astype(q.dtype), mask.block)

    # Gradients of keys and values are summed as columns, so that no operand of their products is transposed.
    d_k, d_v = (jnp.zeros(x.swapaxes(3, 4).shape, jnp.float32) for x in (k_blocks, v_blocks))
    zeros = (d_k, d_v, None if bias is None else jnp.zeros_like(bias))
    items = (jnp.arange(len(mask.first)), mask.first, mask.last, log_total)
    (d_k, d_v, d_bias), d_q = jax.lax.scan(query_block, zeros, items)
    d_sinks = None
    if sinks is not None:
        by_query = log_total.reshape(*log_total.shape[:2], *sinks.shape, mask.block).transpose(1, 0, 4, 2, 3)
        d_sinks = -jnp.sum(jnp.exp(sinks - by_query).reshape(mean.shape) * mean, axis=(0, 1, 4))
    d_k, d_v = _join_columns(d_k).astype(k.dtype), _join_columns(d_v).astype(v.dtype)
    return _Inputs(_join_rows(d_q), d_k, d_v, d_sinks, d_bias), None


def _add_slice(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """`total` with `part` added from `start` of its last axis on."""
    new = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=-1) + part
    return jax.lax.dynamic_update_slice_in_dim(total, new, start, axis=-1)


def _add_block(total: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    """`total` with `part` added to element `index` of its first axis."""
    return jax.lax.dynamic_update_index_in_dim(total, total[index] + part, index, axis=0)


_attention.defvjp(_attention_forward, _attention_backward)
