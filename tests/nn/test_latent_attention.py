"""Latent attention against plain float64, one head at a time, and its cache against itself."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn import rotary
from llmjax.nn.attention import cache_mask
from llmjax.nn.kernels import KERNELS
from llmjax.nn.latent_attention import LatentAttention

HEADS, LATENT, PLAIN, ROPE, VALUE, EMBED = 3, 10, 6, 4, 5, 12


def make_layer(query_rank: int, dtype: str = "float32") -> LatentAttention:
    layer = LatentAttention(
        jax.random.key(0),
        EMBED,
        num_heads=HEADS,
        latent=LATENT,
        query_rank=query_rank,
        head_dim=PLAIN,
        rope_dim=ROPE,
        value_dim=VALUE,
        scale=1.0,
        score_scale=0.4,
        dtype=dtype,
    )
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), nnx.to_pure_dict(state))
    return nnx.merge(graph, moved)


def rows():
    """x, and two documents a row with their positions."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, EMBED)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    return x, segments, positions


def oracle(layer: LatentAttention, x, segments, positions) -> np.ndarray:
    x, w = (
        np.asarray(x, np.float64),
        jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(layer))),
    )

    def norm(y, scale):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale

    def turn(y):
        half, out = ROPE // 2, np.empty_like(y)
        for i in range(half):
            angle = np.asarray(positions) * 100.0 ** (-2 * i / ROPE)
            a, b = y[..., i], y[..., i + half]
            out[..., i], out[..., i + half] = (
                a * np.cos(angle) - b * np.sin(angle),
                a * np.sin(angle) + b * np.cos(angle),
            )
        return out

    source = norm(x @ w["query_down"]["weight"], w["query_norm"]["scale"]) if "query_down" in w else x
    latent = norm(x @ w["latent"]["weight"], w["latent_norm"]["scale"])
    rope, out = turn(x @ w["key_rope"]["weight"]), np.zeros_like(x)
    distance = np.asarray(positions)[:, :, None] - np.asarray(positions)[:, None]
    is_visible = (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None]) & (distance >= 0)
    for head in range(HEADS):
        q = source @ w["query"]["weight"][:, head]
        k, v = latent @ w["key"]["weight"][:, head], latent @ w["value"]["weight"][:, head]
        scores = q[..., :PLAIN] @ k.swapaxes(1, 2) + turn(q[..., PLAIN:]) @ rope.swapaxes(1, 2)
        weights = np.where(is_visible, np.exp(0.4 * scores), 0)
        out += weights / weights.sum(-1, keepdims=True) @ v @ w["out"]["weight"][head]
    return out


@pytest.mark.parametrize("query_rank", [0, 7])
def test_equals_plain_attention(query_rank):
    layer, (x, segments, positions) = make_layer(query_rank), rows()
    prepared = KERNELS["dot"].make_mask(segments, positions, causal=True)
    actual = jax.jit(lambda x: layer(x, rotary.angles(positions, ROPE, 100.0), prepared))(x)
    expected = oracle(layer, x, segments, positions)
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("query_rank", [0, 7])
def test_cache_holds_latents_and_decodes_the_same(query_rank):
    """Decoding in pieces, with rows at different positions."""
    layer, x = make_layer(query_rank), rows()[0]
    ones, positions = jnp.ones((2, 9), int), jnp.broadcast_to(jnp.arange(9), (2, 9))
    full = layer(x, rotary.angles(positions, ROPE, 100.0), KERNELS["dot"].make_mask(ones, positions, causal=True))
    cache = jnp.zeros((2, 16, LATENT)), jnp.zeros((2, 16, ROPE))
    step = jax.jit(
        lambda piece, at, cache: layer.decode(
            piece, rotary.angles(at, ROPE, 100.0), cache_mask(at, 16), cache, at[:, 0]
        )
    )
    _, cache = step(x[:, :2], positions[:, :2], cache)  # of which the first row reads both again
    starts = jnp.array([0, 2])
    for length in (3, 1, 1):
        at = starts[:, None] + jnp.arange(length)
        piece = jnp.take_along_axis(x, at[..., None], axis=1)
        actual, cache = step(piece, at, cache)
        np.testing.assert_allclose(actual, jnp.take_along_axis(full, at[..., None], axis=1), atol=1e-5)
        starts += length
