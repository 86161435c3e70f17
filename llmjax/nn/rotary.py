"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), pairing the two halves of a head."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.nn.materialize import materialize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """How frequencies are lowered so that a model can read more than the `original` positions that it was trained on.

    kind              linear: all are divided by `factor` (Chen et al., 2023, arXiv 2306.15595)
                      llama3, yarn: those with fewer than `low` turns over the original positions are divided by
                      `factor`, those with more than `high` turns are kept, and in between the two are interpolated:
                      linearly in the number of turns (llama3; Llama Team, 2024, arXiv 2407.21783) or in the dimension
                      (yarn; Peng et al., 2023, arXiv 2309.00071)
    truncate          yarn: the first and last interpolated dimensions are rounded outwards to integers
    attention_factor  yarn: factor of cos and sin, so scores get its square
    """

    kind: str
    factor: float
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    truncate: bool = True
    attention_factor: float = 1.0


# Kind -> (low, high) in the paper.
SCALINGS = {"linear": (1.0, 4.0), "llama3": (1.0, 4.0), "yarn": (1.0, 32.0)}


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """The attention factor that YaRN recommends for a frequency factor: 0.1 weight log(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def frequencies(head_dim: int, base: float, scaling: Scaling | None = None) -> np.ndarray:
    """Radians per position for each pair of dimensions, float64 [head_dim / 2], from fast to slow."""
    plain = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain
    lowered = plain / scaling.factor
    if scaling.kind == "linear":
        return lowered
    if scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * math.pi)
        share_kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    else:
        # The pair of dimensions whose frequency makes a number of turns over the original positions.
        dimension = lambda turns: head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(base))
        first, last = dimension(scaling.high), dimension(scaling.low)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        share_kept = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
    return plain * share_kept + lowered * (1 - share_kept)


def angles(
    positions: jax.Array, head_dim: int, base: float, scaling: Scaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """positions int [batch, seq] -> cos and sin, float32 [batch, seq, 1, head_dim / 2]."""
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies(head_dim, base, scaling).astype(np.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return materialize(cos), materialize(sin)


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [batch, seq, heads, head_dim] by the angles of its positions, in float32; returns the type of x.

    `cos` and `sin` are from `angles`, and get no gradient.
    """
    return jax.lax.platform_dependent(x, cos, sin, tpu=rotate_by_matmul, default=rotate_halves)


def _rotate_forward(x, cos, sin):
    return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(saved, cotangent):
    # The transpose of a rotation is the rotation back. JAX's own rule would add its two terms in the type of x.
    cos, sin = saved
    return rotate(cotangent, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate` of the two halves of a head, one after the other."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate_by_matmul(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate` of whole heads: a product with a permutation matrix, exact in every type, exchanges the two halves.

    A TPU computes this in one operation. `rotate_halves` would make it write the halves, which fill half of its lanes,
    and the matmul before it write x in float32.
    """
    permutation = np.roll(np.eye(x.shape[-1]), x.shape[-1] // 2, axis=-1).astype(x.dtype)
    swapped = jnp.matmul(x, permutation, precision="highest").astype(jnp.float32)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
