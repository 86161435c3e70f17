"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), in the layout that pairs the two halves of a head."""

import jax
import jax.numpy as jnp


def angles(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """positions int [batch, seq] -> cos and sin, float32 [batch, seq, 1, head_dim / 2]."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [batch, seq, heads, head_dim] turned by its position; float32 inside, the type of x outside."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
