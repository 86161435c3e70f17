"""Layers against numpy, and the rules that keep them exact."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn import attention, dropout, rotary, stack
from llmjax.nn.linear import Linear, project
from llmjax.nn.mlp import ACTIVATIONS
from llmjax.nn.norm import NORMS
from llmjax.nn.rotary import Scaling
from llmjax.parallel import axes


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("num_inputs", "shape"), [(1, (6, 2, 3)), (2, (2, 3, 5))])
def test_project_has_the_gradient_of_jax(num_inputs, shape):
    x, w = draw(4, 7, *shape[:num_inputs]), draw(*shape, seed=1)
    plain = lambda x, w: jnp.tensordot(x, w, num_inputs)
    score = lambda f: jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))(x, w)
    actual, expected = score(lambda x, w: project(x, w, num_inputs)), score(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize(("dtype", "gradient_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_weight_has_its_gradient_in_the_chosen_type(dtype, gradient_dtype):
    """float32 keeps the bits of a bfloat16 product that bfloat16 loses; bfloat16 rounds a float32 product once."""
    x, w, dy = draw(40, 6).astype(dtype), draw(6, 5, seed=1), draw(40, 5, seed=2).astype(dtype)
    exact = np.einsum("sa,sb->ab", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    # Not compiled: XLA leaves out a cast to bfloat16 and back.
    gradient = lambda w: jax.vjp(lambda w: project(x, w), w)[1](dy)[0]
    default = gradient(w)
    with axes.use_mesh(jax.make_mesh((1,), ("data",)), gradient_dtype=gradient_dtype):
        chosen = gradient(w)
    assert default.dtype == chosen.dtype == w.dtype
    in_float32, in_bfloat16 = (chosen, default) if gradient_dtype == "float32" else (default, chosen)
    # Sums of 40 products in float32; 2^-9 is half a unit in the last of the 8 bits of bfloat16.
    np.testing.assert_allclose(in_float32, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    np.testing.assert_array_equal(in_bfloat16, in_bfloat16.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(in_bfloat16, exact, rtol=0, atol=2**-8 * np.abs(exact).max())


def test_linear_adds_its_bias_and_starts_with_unit_variance():
    layer = Linear(jax.random.key(0), {"heads": 16, "head_dim": 16}, {"embed": 512}, bias=True, dtype="float32")
    layer.bias[...] = jnp.full(512, 3.0)
    x = draw(1000, 16, 16)
    y = layer(x)
    # standard deviation of the variance of 512,000 correlated draws: below 1%
    assert abs(float(jnp.var(y)) - 1) < 0.05 and abs(float(jnp.mean(y)) - 3) < 0.05


@pytest.mark.parametrize("name", NORMS)
def test_norms_compute_in_float32(name):
    norm = NORMS[name](64, eps=1e-6, bias=False, dtype="float32")
    x = 300 + draw(5, 64)
    y = np.asarray(x, np.float64) - (np.asarray(x, np.float64).mean(-1, keepdims=True) if name == "layernorm" else 0)
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    # the mean of 300 takes 8 of 24 bits off a layernorm's differences
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-4)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", NORMS)
def test_norms_over_several_dimensions_are_norms_of_the_flat_vector(name):
    many, one = (NORMS[name](dims, eps=1e-6, bias=True, dtype="float32") for dims in ({"heads": 3, "head_dim": 8}, 24))
    scale = draw(24, seed=1)
    many.scale[...], one.scale[...] = scale.reshape(3, 8), scale
    x = draw(2, 5, 3, 8)
    np.testing.assert_allclose(many(x).reshape(2, 5, 24), one(x.reshape(2, 5, 24)), rtol=1e-5, atol=1e-6)


def test_rmsnorm1p_multiplies_by_one_plus_scale():
    plain, plus = (NORMS[name](16, eps=1e-6, bias=False, dtype="float32") for name in ("rmsnorm", "rmsnorm1p"))
    x = draw(5, 16)
    np.testing.assert_array_equal(plain(x), plus(x))
    plus.scale[...] = jnp.full(16, 0.5)
    np.testing.assert_allclose(plus(x), 1.5 * plain(x), rtol=1e-6)


def test_scaled_frequencies():
    """Fast dimensions are unchanged, slow ones are divided, none is raised; linear scaling divides positions."""
    make = lambda kind, **other: Scaling(kind=kind, factor=8.0, original=4096, **other)
    plain = rotary.frequencies(64, 1e4)
    np.testing.assert_allclose(rotary.frequencies(64, 1e4, make("linear")), plain / 8)
    for scaling in (make("llama3"), make("yarn", high=32.0), make("yarn", high=32.0, truncate=False)):
        actual = rotary.frequencies(64, 1e4, scaling)
        turns = 4096 * plain / (2 * np.pi)
        np.testing.assert_array_equal(actual[turns > 64], plain[turns > 64])
        np.testing.assert_allclose(actual[turns < 0.5], plain[turns < 0.5] / 8)
        assert ((actual <= plain) & (actual >= plain / 8 * (1 - 1e-12))).all() and (np.diff(actual) < 0).all()
    cos, sin = rotary.angles(jnp.array([[3]]), 64, 1e4, make("yarn", attention_factor=2.0))
    np.testing.assert_allclose(cos**2 + sin**2, 4.0, rtol=1e-6)
    assert rotary.yarn_attention_factor(1.0) == 1 and rotary.yarn_attention_factor(40.0) == pytest.approx(1.3689, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [rotary.rotate, rotary.rotate_by_matmul])
def test_rotation_and_its_gradient_agree_with_float32(form, dtype):
    """`rotate` is the form of this platform, `rotate_by_matmul` that of a TPU; halves of 6, which fill no lane."""
    x, dy = (jax.random.normal(jax.random.key(i), (2, 5, 3, 12), dtype) for i in range(2))
    cos, sin = rotary.angles(jnp.arange(10).reshape(2, 5) * 7, 12, 100.0)

    def run(form, x, dy):
        out, transpose = jax.vjp(lambda x: form(x, cos, sin), x)
        return out, transpose(dy)[0]

    expected = run(rotary.rotate_halves, x.astype(jnp.float32), dy.astype(jnp.float32))
    for a, b in zip(jax.jit(functools.partial(run, form))(x, dy), expected, strict=True):
        assert a.dtype == dtype
        # Sums of two products, rounded once: half a unit in the last of 8 bits. JAX's own gradient of the matmul form
        # adds two rounded terms.
        tolerance = 2e-7 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=tolerance * np.abs(b).max())


def test_rotary_depends_on_the_distance_alone():
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)
    at = lambda x, position: rotary.rotate(x, *rotary.angles(jnp.array([[position]]), 8, 100.0))
    score = lambda i, j: float(jnp.vdot(at(q, i), at(k, j)))
    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    np.testing.assert_array_equal(at(q, 0), q)


def test_grouped_attention_equals_repeated_keys():
    q, k, v = draw(2, 10, 6, 4), draw(2, 10, 2, 4, seed=1), draw(2, 10, 2, 4, seed=2)
    segments = np.array([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]])
    mask = attention.attention_mask(jnp.asarray(segments), jnp.asarray(positions), causal=True)
    actual = np.asarray(attention.dot(q, k, v, mask))
    for row in range(2):
        for head in range(6):
            scores = np.asarray(q[row, :, head] @ k[row, :, head // 3].T, np.float64) / 2
            is_visible = np.tril(np.ones((10, 10), bool)) & (segments[row][:, None] == segments[row])
            is_visible |= (segments[row][:, None] == 0) & (
                segments[row] == 0
            )  # padding attends to padding: never scored
            weights = np.where(is_visible, np.exp(scores), 0)
            expected = weights / weights.sum(-1, keepdims=True) @ np.asarray(v[row, :, head // 3])
            np.testing.assert_allclose(actual[row, :, head], expected, atol=1e-6)


def test_attention_mask_of_each_position():
    segments, positions = jnp.array([[1, 1, 1, 2, 2, 2]]), jnp.array([[0, 1, 2, 0, 1, 2]])
    is_visible = lambda **options: (
        np.asarray(attention.attention_mask(segments, positions, **options))[0].astype(int).tolist()
    )
    apart = lambda block: np.kron(np.eye(2, dtype=int), np.array(block)).tolist()
    assert is_visible(causal=False) == apart([[1, 1, 1]] * 3)
    assert is_visible(causal=True) == apart([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    assert is_visible(causal=True, window=2) == apart([[1, 0, 0], [1, 1, 0], [0, 1, 1]])
    assert is_visible(causal=False, window=2) == apart([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    prefix = jnp.array([[True, True, False, True, False, False]])
    expected = np.zeros((6, 6), int)
    expected[:3, :3], expected[3:, 3:] = [[1, 1, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert is_visible(causal=True, prefix=prefix) == expected.tolist()


def test_a_bias_is_added_to_the_scores_of_its_head():
    q, k, v = draw(2, 5, 4, 3), draw(2, 7, 2, 3, seed=1), draw(2, 7, 2, 6, seed=2)
    bias = draw(1, 4, 5, 7, seed=3)
    actual = attention.dot(q, k, v, jnp.ones((2, 5, 7), bool), scale=1.0, bias=bias)
    wide = [jnp.repeat(x, 2, axis=2) for x in (k, v)]
    scores = jnp.einsum("bshk,bthk->bhst", q, wide[0]) + bias
    expected = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(scores, axis=-1), wide[1])
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_softcap_and_sinks():
    q, k, v = draw(2, 5, 4, 3), draw(2, 7, 2, 3, seed=1), draw(2, 7, 2, 6, seed=2)
    sinks = jnp.array([-2.0, 0.0, 3.0, 200.0])
    mask = jnp.asarray(np.random.default_rng(0).random((2, 5, 7)) < 0.7).at[:, :, 0].set(True)
    actual = attention.dot(q, k, v, mask, scale=2.0, softcap=1.5, sinks=sinks)
    wide = [np.repeat(np.asarray(x, np.float64), 2, axis=2) for x in (k, v)]
    scores = 1.5 * np.tanh(2.0 * np.einsum("bshk,bthk->bhst", q, wide[0]) / 1.5)
    parts = np.where(mask[:, None], np.exp(scores), 0)
    total = parts.sum(-1, keepdims=True) + np.exp(np.asarray(sinks, np.float64))[:, None, None]
    np.testing.assert_allclose(actual, np.einsum("bhst,bthk->bshk", parts / total, wide[1]), atol=1e-6)
    assert np.abs(actual[:, :, 3]).max() < 1e-30, "a sink far above the scores takes all weight, and nothing overflows"


def test_keys_are_never_repeated():
    """Arrays of the compiled program with the keys' length hold 2 heads or scores; none holds 8 heads of keys."""
    q, k, v = draw(1, 16, 8, 4), draw(1, 48, 2, 4), draw(1, 48, 2, 4)
    text = jax.jit(attention.dot).lower(q, k, v, jnp.ones((1, 16, 48), bool)).compile().as_text()
    sizes = {
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text) if "48" in dims.split(",")
    }
    assert 48 * 2 * 4 in sizes, "the keys themselves"
    assert 48 * 8 * 4 not in sizes


def test_activations():
    x = np.linspace(-3, 3, 13).astype(np.float32)
    assert ACTIVATIONS["relu2"](x)[-1] == 9 and ACTIVATIONS["relu2"](x)[0] == 0
    np.testing.assert_allclose(ACTIVATIONS["silu"](x), x / (1 + np.exp(-x)), rtol=1e-5)
    assert 1e-5 < np.abs(ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x)).max() < 1e-3


def test_dropout_keeps_the_mean_and_differs_by_layer_and_site():
    sample = jnp.array([[0, 1], [1, 0]], jnp.uint32)
    drop = dropout.for_samples(jax.random.key(0), sample, 0.25)
    x = jnp.ones((2, 100, 100))
    y = drop.at(1).at(0)(x)
    # 20,000 draws: standard deviation of the share that is not dropped 0.003
    assert float(jnp.mean(y > 0)) == pytest.approx(0.75, abs=0.015)
    np.testing.assert_allclose(y[y > 0], 1 / 0.75, rtol=1e-6)
    assert (y[0] != y[1]).any(), "high and low word are told apart"
    assert (y != drop.at(2).at(0)(x)).any() and (y != drop.at(1).at(1)(x)).any()
    np.testing.assert_array_equal(y, drop.at(1).at(0)(x))
    np.testing.assert_array_equal(dropout.for_samples(None, sample, 0.25).at(1)(x), x)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", stack.REMAT)
def test_stack_folds_layers_in_order_and_gathers_outs(scan, remat):
    factors = jnp.array([2.0, 3.0, 5.0])

    def total(factors):
        x, outs = stack.run(lambda x, f: (x * f + 1, x), jnp.ones(()), factors, scan=scan, remat=remat)
        return x, outs

    (x, outs), grads = jax.value_and_grad(total, has_aux=True)(factors)
    assert float(x) == ((1 * 2 + 1) * 3 + 1) * 5 + 1
    np.testing.assert_array_equal(outs, [1, 3, 10])
    np.testing.assert_array_equal(grads, [15, 15, 10])
