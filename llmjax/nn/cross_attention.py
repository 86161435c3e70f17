"""Attention to the keys and values of another sequence, or of the same one, without rotary embedding."""

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name

from llmjax.nn.attention import cache_mask, update_cache
from llmjax.nn.kernels import Mask
from llmjax.nn.linear import Linear
from llmjax.parallel.axes import constrain

KeysValues = tuple[jax.Array, jax.Array]


class CrossAttention(nnx.Module):
    """x [batch, s, embed] attends to a source [batch, t, embed] -> [batch, s, embed].

    Scores are the products of queries and keys times `score_scale`. That is 1 in T5, whose query weights start smaller
    by sqrt(head_dim) instead. No biases.
    """

    def __init__(
        self, key: jax.Array, embed: int, *, num_heads: int, head_dim: int, dtype: str, score_scale: float = 1.0
    ):
        k_query, k_key, k_value, k_out = jax.random.split(key, 4)
        heads = {"heads": num_heads, "head_dim": head_dim}
        self.query = Linear(k_query, {"embed": embed}, heads, bias=False, dtype=dtype, scale=head_dim**-0.5)
        self.key = Linear(k_key, {"embed": embed}, heads, bias=False, dtype=dtype)
        self.value = Linear(k_value, {"embed": embed}, heads, bias=False, dtype=dtype)
        self.out = Linear(k_out, heads, {"embed": embed}, bias=False, dtype=dtype)
        self.score_scale = score_scale

    def keys_values(self, source: jax.Array) -> KeysValues:
        """Keys and values of a source [batch, t, embed], each [batch, t, heads, head_dim]; decoding caches them."""
        k = constrain(self.key(source), "batch", "seq", "heads", "head_dim")
        return k, constrain(self.value(source), "batch", "seq", "heads", "head_dim")

    def __call__(self, x: jax.Array, keys_values: KeysValues, mask: Mask, bias: jax.Array | None = None) -> jax.Array:
        """x [batch, s, embed] -> same; `bias` in the form of the mask's kernel."""
        q = constrain(self.query(x), "batch", "seq", "heads", "head_dim")
        q, k, v = checkpoint_name((q, *(array.astype(x.dtype) for array in keys_values)), "qkv")
        heads = mask.attend(q, k, v, scale=self.score_scale, bias=bias)
        return self.out(constrain(heads, "batch", "seq", "heads", "head_dim"))

    def decode(
        self, x: jax.Array, positions: jax.Array, cache: KeysValues, bias: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """Causal attention of x [batch, s, embed] to itself and to the cached tokens; returns (output, cache).

        x is at consecutive `positions` int [batch, s]. Its keys and values are written to the cache [batch, slots,
        heads, head_dim], whose slot i holds position i. bias [batch, heads, s, slots].
        """
        cache = update_cache(cache, self.keys_values(x), positions[:, 0])
        mask = Mask(cache_mask(positions, cache[0].shape[1]), "dot")
        return self(x, cache, mask, bias), cache
