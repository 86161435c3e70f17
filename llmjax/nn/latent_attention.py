"""Multi-head latent attention: keys and values of all heads come from one cached latent vector."""

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn import rotary
from llmjax.nn.attention import Cache, dot, update_cache
from llmjax.nn.kernels import Mask
from llmjax.nn.linear import Linear
from llmjax.nn.norm import RMSNorm
from llmjax.parallel.axes import constrain

Rope = tuple[jax.Array, jax.Array]

_EPS = 1e-6  # of the norms of the latents, independent of the config's norm_eps


class LatentAttention(nnx.Module):
    """Self-attention over latents.  [batch, seq, embed] -> same.  (DeepSeek-AI, 2024, arXiv 2405.04434, section 2.1)

    latent      width of the normed vector from which every head's keys and values are computed
    query_rank  width of the normed vector from which the queries are computed; 0: from x
    head_dim    width of the part of queries and keys that is not rotated
    rope_dim    width of the rotated part, whose key is computed from x and shared by all heads
    value_dim   width of a value
    score_scale factor of the products of queries and keys
    """

    def __init__(
        self,
        key: jax.Array,
        embed: int,
        *,
        num_heads: int,
        latent: int,
        query_rank: int,
        head_dim: int,
        rope_dim: int,
        value_dim: int,
        scale: float,
        score_scale: float,
        dtype: str,
    ):
        keys = iter(jax.random.split(key, 7))
        linear = lambda inputs, outputs, **scaled: Linear(
            next(keys), inputs, outputs, bias=False, dtype=dtype, **scaled
        )
        norm = lambda width: RMSNorm({"latent": width}, eps=_EPS, bias=False, dtype=dtype)
        x, c = {"embed": embed}, {"latent": latent}
        heads = lambda width: {"heads": num_heads, "head_dim": width}
        self.query_down = linear(x, {"latent": query_rank}) if query_rank else None
        self.query_norm = norm(query_rank) if query_rank else None
        self.query = linear({"latent": query_rank} if query_rank else x, heads(head_dim + rope_dim))
        self.latent, self.latent_norm = linear(x, c), norm(latent)
        self.key_rope = linear(x, {"latent": rope_dim})
        self.key, self.value = linear(c, heads(head_dim)), linear(c, heads(value_dim))
        self.out = linear(heads(value_dim), x, scale=scale)
        self.head_dim, self.score_scale = head_dim, score_scale

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """x [batch, seq, embed] -> both parts of the queries, latents, rotated part of the keys.

        Shapes [batch, seq, heads, head_dim], [batch, seq, heads, rope_dim], [batch, seq, latent], [batch, seq,
        rope_dim].
        """
        q = x if self.query_down is None or self.query_norm is None else self.query_norm(self.query_down(x))
        q = constrain(self.query(q), "batch", "seq", "heads", "head_dim")
        plain_q, rope_q = q[..., : self.head_dim], rotary.rotate(q[..., self.head_dim :], *rope)
        rope_k = rotary.rotate(self.key_rope(x)[:, :, None], *rope)[:, :, 0]
        return plain_q, rope_q, self.latent_norm(self.latent(x)), rope_k

    def __call__(self, x: jax.Array, rope: Rope, mask: Mask) -> jax.Array:
        """x [batch, seq, embed] -> same; `mask` from a kernel's `make_mask`."""
        plain_q, rope_q, latent, rope_k = self.project(x, rope)
        k = constrain(self.key(latent), "batch", "seq", "heads", "head_dim")
        v = constrain(self.value(latent), "batch", "seq", "heads", "head_dim")
        k = jnp.concatenate([k, jnp.broadcast_to(rope_k[:, :, None], rope_q.shape)], axis=-1)
        q = jnp.concatenate([plain_q, rope_q], axis=-1)
        q, k, v = checkpoint_name((q, k, v), "qkv")
        heads = mask.attend(q, k, v, scale=self.score_scale)
        return self.out(constrain(heads, "batch", "seq", "heads", "head_dim"))

    def decode(
        self, x: jax.Array, rope: Rope, mask: jax.Array, cache: Cache, start: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The same over a cache of latents and rotated keys, [batch, slots, latent] and [batch, slots, rope_dim].

        Arguments as in `Attention.decode`. No key or value is computed: queries are projected into the latent space, in
        which the latents are the keys and values of all heads, and the result is projected to values.

        Returns (output, cache).
        """
        plain_q, rope_q, *new = self.project(x, rope)
        cache = update_cache(cache, new, start)
        latent, rope_k = (part.astype(x.dtype) for part in cache)
        absorbed = jnp.einsum("bshk,chk->bshc", plain_q, self.key.merged_weight(x.dtype))
        q = jnp.concatenate([absorbed, rope_q], axis=-1)
        k = jnp.concatenate([latent, rope_k], axis=-1)[:, :, None]
        heads = dot(q, k, latent[:, :, None], mask, scale=self.score_scale)
        values = jnp.einsum("bshc,chv->bshv", heads, self.value.merged_weight(x.dtype))
        return self.out(values), cache
