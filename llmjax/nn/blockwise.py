"""Attention computed block by block: memory linear in the sequence length, in plain JAX, on every platform.

The scores of a block of queries with a block of keys are computed, used and dropped. The softmax is corrected when a
larger score arrives, and the backward pass computes the scores again from the saved logarithm of the softmax's sum.
(Online softmax: Milakov & Gimelshein, 2018, arXiv 1805.02867; attention in linear memory: Rabe & Staats, 2021, arXiv
2112.05682; the backward pass: Dao et al., 2022, FlashAttention, arXiv 2205.14135.)
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn.embedding import MASKED

# Queries and keys of a block. The float32 scores of one block are batch x heads x BLOCK x BLOCK x 4 bytes.
BLOCK = 256


class BlockMask(NamedTuple):
    """Which keys a query sees, without an array of queries x keys.

    segments, positions  int [batch, padded seq]; positions count up by one inside a segment
    prefix               bool [batch, padded seq]: keys that also earlier queries see; None: no key
    window               int []: only keys less than this many positions away are seen
    first, last          int [blocks]: query block i needs the key blocks from first[i] to last[i] - 1
    """

    segments: jax.Array
    positions: jax.Array
    prefix: jax.Array | None
    window: jax.Array
    first: jax.Array
    last: jax.Array


class _Options(NamedTuple):
    """Static arguments of the kernel, as in `nn.attention.dot`."""

    scale: float
    softcap: float | None
    block: int


def block_mask(
    segments: jax.Array,
    positions: jax.Array,
    *,
    causal: bool,
    prefix: jax.Array | None = None,
    window: int | None = None,
    block: int | None = None,
) -> BlockMask:
    """The BlockMask that allows what `nn.attention.attention_mask` allows for the same arguments.

    Segments must be contiguous and positions count up by one inside them, so that blocks can be left out by their
    place in the row; only padding (segment 0), whose result nobody reads, may be otherwise. Sequences are padded to a
    multiple of `block` (None: BLOCK) by tokens of a segment of their own.
    """
    seq = segments.shape[1]
    block = min(block or BLOCK, seq)
    pad = lambda x, value: jnp.pad(x, ((0, 0), (0, -seq % block)), constant_values=value)
    segments, positions = pad(segments, -1), pad(positions, 0)
    if not causal:
        prefix = jnp.ones(segments.shape, bool)
    elif prefix is not None:
        prefix = pad(prefix, False)
    window = segments.shape[1] if window is None else window
    return BlockMask(segments, positions, prefix, jnp.int32(window), *_key_ranges(segments, prefix, window, block))


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
) -> jax.Array:
    """Self-attention with the result of `nn.attention.dot`, to rounding.

    Shapes and arguments as in `dot`; `mask` is from `block_mask`. The output and the logarithm of
    the softmax's sum carry the checkpoint name "attention", so that a remat policy can keep them.
    """
    batch, seq, heads, head_dim = q.shape
    groups, repeats = k.shape[2], heads // k.shape[2]
    padded, blocks = mask.segments.shape[1], mask.first.shape[0]
    options = _Options(head_dim**-0.5 if scale is None else scale, softcap, padded // blocks)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padded - seq), (0, 0), (0, 0)))
    # Heads of a group behind one another inside each query block, so that one matmul serves them all:
    # q [blocks, batch, groups, repeats * block, head_dim], k and v [batch, groups, padded, head_dim].
    q = pad(q).reshape(batch, blocks, options.block, groups, repeats, head_dim)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(blocks, batch, groups, repeats * options.block, head_dim)
    k, v = pad(k).swapaxes(1, 2), pad(v).swapaxes(1, 2)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(groups, repeats)
    out: jax.Array = _attention(options, q, k, v, sink, mask)
    out = out.reshape(blocks, batch, groups, repeats, options.block, -1).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, padded, heads, -1)[:, :seq]


def _scores(
    options: _Options, q: jax.Array, k: jax.Array, mask: BlockMask, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Masked float32 scores [batch, groups, repeats * block, block] of query block `query` and key block `key`.

    q [batch, groups, repeats * block, head_dim], k [batch, groups, block, head_dim]. Also returns the derivative of the
    soft-cap, None without one.
    """
    scores = options.scale * jnp.einsum("bgsk,bgtk->bgst", q, k, preferred_element_type=jnp.float32)
    slope = None
    if options.softcap is not None:
        capped = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * capped, 1 - capped**2
    cut = lambda x, index: jax.lax.dynamic_slice_in_dim(x, index * options.block, options.block, axis=1)
    distance = cut(mask.positions, query)[:, :, None] - cut(mask.positions, key)[:, None, :]
    visible = cut(mask.segments, query)[:, :, None] == cut(mask.segments, key)[:, None, :]
    past = distance >= 0
    visible &= past if mask.prefix is None else past | cut(mask.prefix, key)[:, None, :]
    visible &= jnp.abs(distance) < mask.window
    repeats = q.shape[2] // options.block
    return jnp.where(jnp.tile(visible, (1, repeats, 1))[:, None], scores, MASKED), slope


def _block(x: jax.Array, index: jax.Array, options: _Options) -> jax.Array:
    """Block `index` of x [batch, groups, padded, width]."""
    return jax.lax.dynamic_slice_in_dim(x, index * options.block, options.block, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    options: _Options, q: jax.Array, k: jax.Array, v: jax.Array, sink: jax.Array | None, mask: BlockMask
) -> jax.Array:
    """q [blocks, batch, groups, repeats * block, head_dim], k and v [batch, groups, padded, head_dim], sink [groups,
    repeats] -> [blocks, batch, groups, repeats * block, v's head_dim]."""
    return _forward(options, q, k, v, sink, mask)[0]


def _forward(
    options: _Options, q: jax.Array, k: jax.Array, v: jax.Array, sink: jax.Array | None, mask: BlockMask
) -> tuple[jax.Array, jax.Array]:
    """The output, and the logarithm of the softmax's sum, float32 [blocks, batch, groups, repeats * block, 1]."""
    rows = (*q.shape[1:-1], 1)
    highest, total = jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)
    if sink is not None:  # as a key that every query sees and whose value is 0
        highest = jnp.broadcast_to(jnp.repeat(sink, options.block, axis=1)[None, :, :, None], rows)
        total = jnp.ones(rows, jnp.float32)

    def query_block(_, item):
        q, query, first, last = item

        def key_block(key, carry):
            out, highest, total = carry
            scores, _ = _scores(options, q, _block(k, key, options), mask, query, key)
            new = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
            correction, weights = jnp.exp(highest - new), jnp.exp(scores - new)
            values = jnp.einsum(
                "bgst,bgtk->bgsk", weights.astype(v.dtype), _block(v, key, options), preferred_element_type=jnp.float32
            )
            total = correction * total + jnp.sum(weights, axis=-1, keepdims=True)
            return correction * out + values, new, total

        out = jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32)
        out, new, sums = jax.lax.fori_loop(first, last, key_block, (out, highest, total))
        return None, ((out / sums).astype(v.dtype), new + jnp.log(sums))

    index = jnp.arange(mask.first.shape[0])
    return jax.lax.scan(query_block, None, (q, index, mask.first, mask.last))[1]


def _attention_forward(
    options: _Options, q: jax.Array, k: jax.Array, v: jax.Array, sink: jax.Array | None, mask: BlockMask
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, log_total = (checkpoint_name(x, "attention") for x in _forward(options, q, k, v, sink, mask))
    return out, (q, k, v, sink, mask, out, log_total)


def _attention_backward(options: _Options, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, sink, mask, out, log_total = saved
    # What a weight's gradient is compared with: the sum over keys of weight times gradient (Dao et al., section 3.1).
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def query_block(carry, item):
        q, d_out, log_total, mean, query, first, last = item

        def key_block(key, carry):
            d_q, d_k, d_v = carry
            k_block, v_block = _block(k, key, options), _block(v, key, options)
            scores, slope = _scores(options, q, k_block, mask, query, key)
            weights = jnp.exp(scores - log_total)
            d_weights = jnp.einsum("bgsk,bgtk->bgst", d_out, v_block, preferred_element_type=jnp.float32)
            d_scores = options.scale * weights * (d_weights - mean)
            if slope is not None:
                d_scores *= slope
            d_scores, weights = d_scores.astype(q.dtype), weights.astype(d_out.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_q += product("bgst,bgtk->bgsk", d_scores, k_block)
            d_k = _add_block(d_k, product("bgst,bgsk->bgtk", d_scores, q), key, options)
            d_v = _add_block(d_v, product("bgst,bgsk->bgtk", weights, d_out), key, options)
            return d_q, d_k, d_v

        d_q, *carry = jax.lax.fori_loop(first, last, key_block, (jnp.zeros(q.shape, jnp.float32), *carry))
        return tuple(carry), d_q.astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    items = (q, d_out, log_total, mean, jnp.arange(mask.first.shape[0]), mask.first, mask.last)
    (d_k, d_v), d_q = jax.lax.scan(query_block, zeros, items)
    d_sink = None
    if sink is not None:
        per_query = -jnp.exp(jnp.repeat(sink, options.block, axis=1)[None, None, :, :, None] - log_total) * mean
        d_sink = jnp.sum(per_query.reshape(*per_query.shape[:3], *sink.shape[1:], options.block), axis=(0, 1, 4))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), d_sink, None


def _add_block(total: jax.Array, block: jax.Array, index: jax.Array, options: _Options) -> jax.Array:
    """`total` [batch, groups, padded, width] with `block` added to block `index`."""
    new = _block(total, index, options) + block
    return jax.lax.dynamic_update_slice_in_dim(total, new, index * options.block, axis=2)


_attention.defvjp(_attention_forward, _attention_backward)
