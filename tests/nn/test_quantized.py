"""Quantized linear layers: their products and gradients, what they leave alone, and what they cost in loss."""

import dataclasses
import functools
import importlib.util
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn import quantized, stack
from llmjax.nn.linear import project
from llmjax.optim.config import OptimizerConfig
from tests.batches import packed, packed_for
from tests.models.programs import (
    assert_close,
    init_model,
    loss_and_grads,
    sharded_loss_and_grads,
    train_on_progressions,
)
from tests.models.variants import BERT, DEEPSEEK, LLAMA, RGLRU, SEQ, T5_V11, VOCAB

qwix = pytest.importorskip("qwix")

TYPES = [name for name in quantized.QUANTIZATIONS if name != "none"]
DTYPES = {"int8": (jnp.int8, jnp.int8), "float8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantize(x, axis, dtype):
    """(multiples, scales) of x, with one scale for all of `axis`; each product is within half a step of x."""
    largest = 127 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    calibration = f"absmax,{127.5 / 127}" if dtype == jnp.int8 else "absmax"
    array = qwix.quantize(jnp.asarray(x), dtype, channelwise_axes=[1 - axis], calibration_method=calibration)
    multiples, scale = np.asarray(array.qvalue, np.float32), np.asarray(array.scale)
    np.testing.assert_array_equal(np.max(np.abs(multiples), axis=axis), largest)
    # Floats have steps of 2^-3 (e4m3) and 2^-2 (e5m2) of the power of two below them, and of 2^-9 and 2^-16 near 0.
    steps = {jnp.int8: (0, 1), jnp.float8_e4m3fn: (2**-3, 2**-9), jnp.float8_e5m2: (2**-2, 2**-16)}
    relative, absolute = steps[dtype]
    assert np.all(np.abs(multiples * scale - x) <= 0.5001 * (relative * np.abs(x) + absolute * scale))
    return multiples, scale


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("num_inputs", "shape"), [(1, (64, 3, 8)), (2, (4, 16, 24))])
def test_products_and_gradients_are_those_of_quantized_operands(name, num_inputs, shape):
    """y = (scale x)(w scale), dx = (scale (dy scale)) w^T, where only scales and dy are no multiples; dw = x^T dy."""
    x, w, dy = draw(2, 7, *shape[:num_inputs]), draw(*shape, seed=1), draw(2, 7, *shape[num_inputs:], seed=2)
    with quantized.use(name):
        y, gradient = jax.vjp(lambda x, w: project(x, w, num_inputs), x, w)
    dx, dw = gradient(dy)

    flat = lambda a, columns: np.reshape(a, (-1, columns))
    inputs, outputs = int(np.prod(shape[:num_inputs])), int(np.prod(shape[num_inputs:]))
    y, dx, dw, x, w, dy = (
        flat(a, columns)
        for a, columns in ((y, outputs), (dx, inputs), (dw, outputs), (x, inputs), (w, outputs), (dy, outputs))
    )
    forward, backward = DTYPES[name]
    (x8, x_scale), (w8, w_scale) = quantize(x, 1, forward), quantize(w, 0, forward)
    dy8, dy_scale = quantize(dy * w_scale, 1, backward)
    # Sums of 64 products in float32, of numbers up to 4.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(y, (x8 * x_scale) @ (w8 * w_scale))
    close(dx, (dy8 * dy_scale) @ w8.T)
    close(dw, x.T @ dy)


@pytest.mark.parametrize("name", TYPES)
def test_zeros_stay_zeros(name):
    """Padding may have a row of zeros, and some weights start at 0."""
    x, w = draw(3, 8) * np.array([[1], [0], [1]], np.float32), draw(8, 4) * np.array([1, 0, 1, 1], np.float32)
    with quantized.use(name):
        y, gradient = jax.vjp(project, x, w)
    dx, dw = gradient(y)
    assert not np.any(y[1]) and not np.any(y[:, 1]) and np.isfinite(dx).all() and np.isfinite(dw).all()


def dots(function, *args):
    """The number of matmuls of two operands of 8 bits in a function, loops counted once, and of all matmuls."""
    text = str(jax.make_jaxpr(function)(*args))
    results = re.findall(r":(\w+)\[[^\]]*\] = dot_general", text)
    return len(re.findall(r"preferred_element_type=int32", text)), len(results)


@pytest.mark.parametrize(
    ("config", "quantized_maps"),
    [
        (LLAMA, 7),  # q, k, v, out, gate, up, down
        (DEEPSEEK, None),
        (BERT, 6),
        (T5_V11, 7 + 11),
        (RGLRU, 6),  # input, gate, out of the recurrence; gate, up, down
    ],
    ids=["llama", "deepseek", "bert", "t5", "rglru"],
)
def test_linear_layers_of_blocks_are_quantized_and_nothing_else(config, quantized_maps):
    graph, params = registry.abstract(config)[:2]
    batch = packed_for(config, 2, SEQ, VOCAB)
    forward = lambda graph: lambda params: nnx.merge(graph, params)(batch).hidden
    plain = dots(forward(graph), params)
    config = dataclasses.replace(config, quantization="int8")
    found = dots(forward(registry.abstract(config)[0]), params)
    assert plain[0] == 0 and found[1] == plain[1]
    assert found[0] == quantized_maps if quantized_maps else 0 < found[0] < found[1]
    head = lambda params: nnx.merge(registry.abstract(config)[0], params).unembed(jnp.ones((2, config.embed)))
    assert dots(head, params)[0] == 0


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_policy_that_saves_matmuls_saves_scaled_outputs(remat):
    """The output of an int8 matmul is int32: saved in its place, that of type bfloat16 takes half the memory."""
    weights, x = jnp.ones((2, 16, 16), jnp.bfloat16), jnp.ones((24, 16), jnp.bfloat16)

    def loss(x, weights):
        body = lambda x, w: (jnp.sin(project(jnp.sin(project(x, w)), w)), None)
        return jnp.sum(stack.run(body, x, weights, scan=True, remat=remat, quantization="int8")[0])

    saved = [leaf for leaf in jax.tree.leaves(jax.vjp(loss, x, weights)[1]) if leaf.shape[-2:] == x.shape]
    stacked = [leaf for leaf in saved if leaf.shape == (2, *x.shape)]
    assert {leaf.dtype for leaf in saved} == {jnp.dtype(jnp.bfloat16)}
    assert len(stacked) == (3 if remat == "dots" else 1)  # the layers' inputs, and both products


@pytest.mark.parametrize("name", ["int8", pytest.param("float8", marks=pytest.mark.slow)])
def test_scanned_layers_on_a_mesh_equal_unrolled_ones_on_one_device(name):
    """Scales do not depend on the mesh, but values differ in the last bits of float32. About one of 10,000 lies that
    close to the middle of two steps and is rounded the other way, by 1/127 of a row's largest (float8: 1/8 of itself).
    That moves the later values of its row by more than their last bits, so that more of them are rounded the other way.
    A scale of the wrong row or output would change gradients by a factor."""
    config = dataclasses.replace(LLAMA, quantization=name, remat="dots_attention")
    graph, params = init_model(dataclasses.replace(config, scan=False, remat="none"))
    batch = packed(8, SEQ, VOCAB)
    expected_loss, expected = loss_and_grads(graph, params, batch)
    loss, grads = sharded_loss_and_grads(config, params, batch, (2, 2, 2))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-3)
    assert_close(grads, expected, rtol=0.03)


@pytest.mark.parametrize("quantization", ["int4", ""])
def test_unknown_types_are_refused(quantization):
    with pytest.raises(UserError, match=r"model.quantization=.*: choose one of none, int8, float8"):
        DecoderConfig(quantization=quantization)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quantized.check_installed("none")
    with pytest.raises(UserError, match=r"model.quantization='int8': the package qwix is not installed: run `pip inst"):
        quantized.check_installed("int8")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", TYPES)
def test_what_quantization_costs_in_loss(quantization):
    """100 steps on sequences with a constant difference modulo the vocabulary, which the model learns to continue."""

    train = lambda quantization: train_on_progressions(
        dataclasses.replace(LLAMA, quantization=quantization), OptimizerConfig(learning_rate=1e-2), steps=100
    )
    found, expected = train(quantization), train("none")
    assert np.mean(expected[-10:]) < expected[0] - 1
    assert abs(np.mean(found[-10:]) - np.mean(expected[-10:])) < 0.05
