"""Normalisation over the embed dimension, computed in float32."""

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.nn import weights


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, without a bias.  [..., embed] -> same.  (Zhang and Sennrich, 2019, arXiv 1910.07467)"""

    def __init__(self, embed: int, *, eps: float, bias: bool, dtype: str):
        del bias
        self.scale = weights.constant(1.0, {"embed": embed}, dtype=dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias.  [..., embed] -> same.  (Ba et al., 2016, arXiv 1607.06450)"""

    def __init__(self, embed: int, *, eps: float, bias: bool, dtype: str):
        self.scale = weights.constant(1.0, {"embed": embed}, dtype=dtype)
        self.bias = weights.constant(0.0, {"embed": embed}, dtype=dtype) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
