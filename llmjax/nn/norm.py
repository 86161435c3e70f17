"""Normalisation over the last dimensions, computed in float32."""

from collections.abc import Mapping

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.nn import weights


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, without a bias.  [..., *dims] -> same.  (Zhang and Sennrich, 2019, arXiv 1910.07467)

    `dims` maps logical axes to sizes, such as {"heads": 8, "head_dim": 64}; the mean is over all of them together. A
    number n stands for {"embed": n}.
    """

    def __init__(self, dims: int | Mapping[str, int], *, eps: float, bias: bool, dtype: str):
        del bias
        self.scale = weights.constant(1.0, _as_mapping(dims), dtype=dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *dims] -> same."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=_dims_of(self.scale), keepdims=True) + self.eps)
        return (y * self.factor()).astype(x.dtype)

    def factor(self) -> jax.Array:
        """The factor of the normed values, float32 [*dims]."""
        return self.scale[...].astype(jnp.float32)


class RMSNorm1p(RMSNorm):
    """x / rms(x) * (1 + scale) with a scale that starts at 0, so that weight decay pulls the factor to 1 (Gemma)."""

    def __init__(self, dims: int | Mapping[str, int], *, eps: float, bias: bool, dtype: str):
        super().__init__(dims, eps=eps, bias=bias, dtype=dtype)
        self.scale = weights.constant(0.0, _as_mapping(dims), dtype=dtype)

    def factor(self) -> jax.Array:
        """The factor of the normed values, float32 [*dims]."""
        return 1 + super().factor()


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias.  [..., *dims] -> same.  (Ba et al., 2016, arXiv 1607.06450)

    `dims` as in RMSNorm.
    """

    def __init__(self, dims: int | Mapping[str, int], *, eps: float, bias: bool, dtype: str):
        self.scale = weights.constant(1.0, _as_mapping(dims), dtype=dtype)
        self.bias = weights.constant(0.0, _as_mapping(dims), dtype=dtype) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *dims] -> same."""
        y, last = x.astype(jnp.float32), _dims_of(self.scale)
        y = y - jnp.mean(y, axis=last, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=last, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "rmsnorm1p": RMSNorm1p, "layernorm": LayerNorm}


def _as_mapping(dims: int | Mapping[str, int]) -> Mapping[str, int]:
    return {"embed": dims} if isinstance(dims, int) else dims


def _dims_of(scale: nnx.Param) -> tuple[int, ...]:
    return tuple(range(-scale[...].ndim, 0))
