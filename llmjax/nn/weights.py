"""Create parameters: a value, and the logical axis of each dimension."""

from collections.abc import Mapping

from flax import nnx
import jax
import jax.numpy as jnp

# llmjax.parallel.axes derives shardings from the axes; constructors of layers do not.
nnx.use_eager_sharding(False)


def normal(key: jax.Array, dims: Mapping[str, int], *, std: float, dtype: str) -> nnx.Param:
    """A parameter of shape `dims` (logical axis -> size), drawn from a normal distribution."""
    value = std * jax.random.normal(key, tuple(dims.values()), jnp.float32)
    return nnx.Param(value.astype(dtype), out_sharding=tuple(dims))


def constant(value: float, dims: Mapping[str, int], *, dtype: str) -> nnx.Param:
    """A parameter of shape `dims` (logical axis -> size) that starts at one value."""
    return nnx.Param(jnp.full(tuple(dims.values()), value, dtype), out_sharding=tuple(dims))


def from_array(value: jax.Array, axes: tuple[str, ...], *, dtype: str) -> nnx.Param:
    """A parameter that starts at `value`, one logical axis for each of its dimensions."""
    return nnx.Param(value.astype(dtype), out_sharding=axes)
