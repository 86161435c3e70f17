"""Self-attention that stays inside a segment; the kernel is chosen by name."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn import rotary
from llmjax.nn.embedding import MASKED
from llmjax.nn.linear import Linear
from llmjax.parallel.axes import constrain


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute attention.

    prepare   (segments and positions [batch, seq], prefix bool [batch, seq] or None) -> what the kernel needs to know
              about them, made once for all layers
    attend    (q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads, head_dim], prepared) -> like q
    """

    prepare: Callable[[jax.Array, jax.Array, jax.Array | None], Any]
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def visible(
    segments: jax.Array,
    positions: jax.Array,
    *,
    causal: bool,
    prefix: jax.Array | None = None,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """segments, positions [batch, seq] -> bool [batch, seq (queries), seq (keys)]: who sees whom, in a segment only.

    causal   no key after its query, but for keys in the segment's `prefix` (bool [batch, seq])
    window   only keys less than this many positions away; None: all. May differ between layers of a scan
    """
    distance = positions[:, :, None] - positions[:, None, :]
    seen = segments[:, :, None] == segments[:, None, :]
    if causal:
        past = distance >= 0
        seen &= past if prefix is None else past | prefix[:, None, :]
    return seen if window is None else seen & (jnp.abs(distance) < window)


def dot(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Plain attention with a float32 softmax: the oracle for every other kernel.

    q [batch, s, heads, head_dim]; k, v [batch, t, kv_heads, head_dim], v's head_dim its own; mask bool [batch, s, t];
    bias, if any, is added to the scores: [batch or 1, heads, s, t]. scale None: 1 / sqrt(head_dim). Returns [batch, s,
    heads, v's head_dim]. Query heads are grouped by the key head they share, so keys and values are never repeated.
    """
    batch, s, heads, head_dim = q.shape
    groups, repeats = k.shape[2], heads // k.shape[2]
    # Head-major, and the heads of a group one below the other: plain batched matmuls with nothing to transpose inside.
    q = (q * (head_dim**-0.5 if scale is None else scale)).reshape(batch, s, groups, repeats, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, repeats * s, head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bgsk,bgtk->bgst", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias.astype(jnp.float32).reshape(bias.shape[0], groups, repeats * s, -1)
    scores = jnp.where(jnp.tile(mask, (1, repeats, 1))[:, None], scores, MASKED)
    # Softmax, divided after the product with the values: head_dim numbers a query instead of t.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bgst,bgtk->bgsk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)
    out = out.reshape(batch, groups, repeats, s, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, s, heads, -1)


def _causal(segments: jax.Array, positions: jax.Array, prefix: jax.Array | None) -> jax.Array:
    return visible(segments, positions, causal=True, prefix=prefix)


KERNELS = {"dot": Kernel(_causal, dot)}


class Attention(nnx.Module):
    """Grouped-query self-attention.  [batch, seq, embed] -> same.  (Ainslie et al., 2023, arXiv 2305.13245)"""

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
        kernel: str,
        dtype: str,
    ):
        k_query, k_key, k_value, k_out = jax.random.split(key, 4)
        heads, kv_heads = {"heads": num_heads, "head_dim": head_dim}, {"kv_heads": num_kv_heads, "head_dim": head_dim}
        self.query = Linear(k_query, {"embed": embed}, heads, bias=bias, dtype=dtype)
        self.key = Linear(k_key, {"embed": embed}, kv_heads, bias=bias, dtype=dtype)
        self.value = Linear(k_value, {"embed": embed}, kv_heads, bias=bias, dtype=dtype)
        self.out = Linear(k_out, heads, {"embed": embed}, bias=bias, dtype=dtype, scale=scale)
        self.kernel = kernel

    def project(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [batch, seq, embed] -> q [batch, seq, heads, head_dim]; k, v [batch, seq, kv_heads, head_dim]; rotated."""
        q = constrain(self.query(x), "batch", "seq", "heads", "head_dim")
        k = constrain(self.key(x), "batch", "seq", "kv_heads", "head_dim")
        v = constrain(self.value(x), "batch", "seq", "kv_heads", "head_dim")
        return (q, k, v) if angles is None else (rotary.rotate(q, *angles), rotary.rotate(k, *angles), v)

    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None, prepared: Any) -> jax.Array:
        q, k, v = self.project(x, angles)
        heads = checkpoint_name(KERNELS[self.kernel].attend(q, k, v, prepared), "attention")
        return self.out(constrain(heads, "batch", "seq", "heads", "head_dim"))

    def cached(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array] | None,
        positions: jax.Array,
        cache: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The same over a cache of keys and values, each [batch, slots, kv_heads, head_dim]; slot i holds position i.

        x [batch, seq, embed] stands at consecutive `positions` int [batch, seq], which may start elsewhere in each row.
        Its keys and values are written there first; slots beyond a query's position are not seen. Returns (output,
        cache).
        """
        q, *new = self.project(x, angles)
        write = jax.vmap(lambda old, rows, start: jax.lax.dynamic_update_slice_in_dim(old, rows, start, axis=0))
        k, v = (write(old, rows.astype(old.dtype), positions[:, 0]) for old, rows in zip(cache, new, strict=True))
        mask = jnp.arange(k.shape[1]) <= positions[:, :, None]
        return self.out(dot(q, k.astype(q.dtype), v.astype(q.dtype), mask)), (k, v)
