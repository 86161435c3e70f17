"""Self-attention inside segments, and the reference form of attention."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn import rotary, weights
from llmjax.nn.embedding import MASKED
from llmjax.nn.linear import Linear
from llmjax.nn.materialize import materialize
from llmjax.parallel.axes import constrain

Rope = tuple[jax.Array, jax.Array] | None  # cos and sin of the rotary angles; None: nothing is rotated
Cache = tuple[jax.Array, jax.Array]


def attention_mask(
    segments: jax.Array | None,
    positions: jax.Array,
    *,
    causal: bool,
    prefix: jax.Array | None = None,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """segments, positions [batch, seq] -> bool [batch, seq (queries), seq (keys)]: True for keys of the same segment.

    segments None: a row is one segment to its end. A causal mask then hides the padding at the end from all text
    causal   no key after its query, except keys in the segment's `prefix` (bool [batch, seq])
    window   only keys less than this many positions away; None: all
    """
    if segments is None:
        segments, positions = one_segment(positions)
    distance = positions[:, :, None] - positions[:, None, :]
    mask = segments[:, :, None] == segments[:, None, :]
    if causal:
        past = distance >= 0
        mask &= past if prefix is None else past | prefix[:, None, :]
    return mask if window is None else mask & (jnp.abs(distance) < window)


def one_segment(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Segments and positions, like `positions` [batch, seq], of rows that are one segment each."""
    return jnp.zeros_like(positions), jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)


def cache_mask(positions: jax.Array, slots: int, window: int | None = None) -> jax.Array:
    """positions [batch, seq] -> bool [batch, seq, slots]: slot i holds position i; no slot after a query, nor `window`
    or more positions before it."""
    distance = positions[:, :, None] - jnp.arange(slots)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def update_cache(cache: Cache, new: Sequence[jax.Array], start: jax.Array) -> Cache:
    """The cache, each leaf [batch, slots, ...], with `new` [batch, seq, ...] written from slot `start` [batch] on."""
    write = jax.vmap(lambda old, rows, at: jax.lax.dynamic_update_slice_in_dim(old, rows, at, axis=0))
    first, second = (write(old, rows.astype(old.dtype), start) for old, rows in zip(cache, new, strict=True))
    return first, second


def dot(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Plain attention with a float32 softmax: the reference for every other kernel.

    q [batch, s, heads, head_dim]; k, v [batch, t, kv_heads, head_dim], where v may have another head_dim; mask bool
    [batch, s, t]. Returns [batch, s, heads, v's head_dim]. Query heads are grouped by the key head that they share, so
    keys and values are never repeated. The output carries the checkpoint name "attention", for remat policies.

    scale     of the products; None: 1 / sqrt(head_dim)
    softcap   scores become softcap tanh(scores / softcap) before the mask (Gemma Team, 2024, arXiv 2408.00118)
    sinks     [heads], one more score per query, which takes part in the softmax and has no value (OpenAI, 2025, arXiv
              2508.10925)
    bias      [batch or 1, heads, s, t], added to the scores
    """
    batch, s, heads, head_dim = q.shape
    groups, repeats = k.shape[2], heads // k.shape[2]
    # Heads first, and those of a group concatenated along the sequence: batched matmuls without transposes inside.
    q = (q * (head_dim**-0.5 if scale is None else scale)).reshape(batch, s, groups, repeats, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, repeats * s, head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = _scores(q, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.astype(jnp.float32).reshape(bias.shape[0], groups, repeats * s, -1)
    scores = jnp.where(jnp.tile(mask, (1, repeats, 1))[:, None], scores, MASKED)
    # The softmax is divided by its sum after the product with the values: head_dim numbers per query instead of t.
    highest, sink = jnp.max(scores, axis=-1, keepdims=True), None
    if sinks is not None:
        sink = jnp.repeat(sinks.astype(jnp.float32).reshape(groups, repeats), s, axis=1)[None, :, :, None]
        highest = jnp.maximum(highest, sink)
    highest = jax.lax.stop_gradient(highest)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - highest)
    out = checkpoint_name(_averages(exponentials.astype(v.dtype), total, v).astype(v.dtype), "attention")
    out = out.reshape(batch, groups, repeats, s, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, s, heads, -1)


# The gradients below are those that JAX would derive. They are written out so that the matrix [queries, keys] is never
# an operand that is transposed or contracted over its rows, for which XLA:CPU takes 3 times as long (`materialize`).
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _score(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [b, g, s, d] times k [b, g, t, d] -> float32 [b, g, s, t]."""
    return _product("bgsd,bgtd->bgst", q, k)


def _score_forward(q, k):
    return _score(q, k), (q, k)


def _score_backward(saved, d_scores):
    q, k = saved
    d_scores = d_scores.astype(q.dtype)
    d_k = _product("bgds,bgst->bgdt", materialize(q.swapaxes(2, 3)), d_scores).swapaxes(2, 3)
    return _product("bgst,bgtd->bgsd", d_scores, k).astype(q.dtype), d_k.astype(k.dtype)


_scores = jax.custom_vjp(_score)
_scores.defvjp(_score_forward, _score_backward)


def _average(weights: jax.Array, total: jax.Array, v: jax.Array) -> jax.Array:
    """weights [b, g, s, t] times v [b, g, t, d], over total, float32 [b, g, s, 1] -> float32 [b, g, s, d]."""
    return _product("bgst,bgtd->bgsd", weights, v) / total


def _average_forward(weights, total, v):
    out = _average(weights, total, v)
    return out, (weights, total, v, out)


def _average_backward(saved, d_out):
    weights, total, v, out = saved
    d_sum = d_out / total
    d_total = -jnp.sum(d_sum * out, axis=-1, keepdims=True)
    d_sum = d_sum.astype(v.dtype)
    d_weights = _product("bgsd,bgdt->bgst", d_sum, materialize(v.swapaxes(2, 3)))
    d_v = _product("bgds,bgst->bgdt", materialize(d_sum.swapaxes(2, 3)), weights).swapaxes(2, 3)
    return d_weights.astype(weights.dtype), d_total, d_v.astype(v.dtype)


_averages = jax.custom_vjp(_average)
_averages.defvjp(_average_forward, _average_backward)


class Attention(nnx.Module):
    """Multi-head attention with shared key and value heads.  [batch, seq, embed] -> same.

    bias                   whether the four linear maps have biases
    sinks                  whether each head has a learned score without a value, as in `dot`
    query_norm, key_norm   applied to [batch, seq, heads, head_dim] before the rotation; None: no norm
    score_scale, softcap   as in `dot`
    scale                  factor of the initial output weights

    (Grouped queries: Ainslie et al., 2023, arXiv 2305.13245; normed queries and keys: Henry et al., 2020, arXiv
    2010.04245)
    """

    def __init__(
        self,
        key: jax.Array,
        embed: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        scale: float,
        dtype: str,
        score_scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        query_norm: Callable[[jax.Array], jax.Array] | None = None,
        key_norm: Callable[[jax.Array], jax.Array] | None = None,
    ):
        k_query, k_key, k_value, k_out = jax.random.split(key, 4)
        heads, kv_heads = {"heads": num_heads, "head_dim": head_dim}, {"kv_heads": num_kv_heads, "head_dim": head_dim}
        self.query = Linear(k_query, {"embed": embed}, heads, bias=bias, dtype=dtype)
        self.key = Linear(k_key, {"embed": embed}, kv_heads, bias=bias, dtype=dtype)
        self.value = Linear(k_value, {"embed": embed}, kv_heads, bias=bias, dtype=dtype)
        self.out = Linear(k_out, heads, {"embed": embed}, bias=bias, dtype=dtype, scale=scale)
        self.query_norm, self.key_norm = query_norm, key_norm
        self.sinks = weights.constant(0.0, {"heads": num_heads}, dtype=dtype) if sinks else None
        self.score_scale, self.softcap = score_scale, softcap

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [batch, seq, embed] -> q [batch, seq, heads, head_dim]; k, v [batch, seq, kv_heads, head_dim].

        q and k are normed and rotated.
        """
        q = constrain(self.query(x), "batch", "seq", "heads", "head_dim")
        k = constrain(self.key(x), "batch", "seq", "kv_heads", "head_dim")
        v = constrain(self.value(x), "batch", "seq", "kv_heads", "head_dim")
        if self.query_norm is not None:
            q = self.query_norm(q)
        if self.key_norm is not None:
            k = self.key_norm(k)
        return (q, k, v) if rope is None else (rotary.rotate(q, *rope), rotary.rotate(k, *rope), v)

    def __call__(self, x: jax.Array, rope: Rope, mask: Any) -> jax.Array:
        """x [batch, seq, embed] -> same; `mask` is a `nn.kernels.Mask`."""
        q, k, v = checkpoint_name(self.project(x, rope), "qkv")
        heads = mask.attend(q, k, v, **self._score_options())
        heads = constrain(heads, "batch", "seq", "heads", "head_dim")
        return self.out(heads)

    def decode(
        self, x: jax.Array, rope: Rope, mask: jax.Array, cache: Cache, start: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The same over a cache of keys and values, each [batch, slots, kv_heads, head_dim]; slot i holds position i.

        x [batch, seq, embed] is at consecutive positions from `start` [batch] on. Its keys and values are written to
        the cache first; `mask` is from `cache_mask`. Returns (output, cache).
        """
        q, *new = self.project(x, rope)
        k, v = cache = update_cache(cache, new, start)
        return self.out(dot(q, k.astype(q.dtype), v.astype(q.dtype), mask, **self._score_options())), cache

    def _score_options(self) -> dict[str, Any]:
        sinks = None if self.sinks is None else self.sinks[...]
        return {"scale": self.score_scale, "softcap": self.softcap, "sinks": sinks}
