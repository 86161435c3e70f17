"""Moments in bfloat16 and in 8 bits: rounding error and bias, meshes, memory, and what they cost in loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.checkpoint.manager import Checkpoints
from llmjax.models.decoder_config import DecoderConfig
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.moments import block_axis, block_size, dequantize, quantize, store_moments
from llmjax.optim.optimizer import make_optimizer
from llmjax.parallel.axes import shardings, use_mesh
from llmjax.plan import count
from tests.models.programs import train_on_progressions
from tests.models.variants import LLAMA
from tests.optim.parameters import AXES, random_tree, run

STEPS = 3


# Blocks along the sharded axis, and along the one before it. Fewer leaves compile faster.
LEAVES = {"table": AXES["table"], "blocks": {"down": AXES["blocks"]["down"]}}


def make(moment_dtype, name="adamw"):
    config = OptimizerConfig(name=name, moment_dtype=moment_dtype, learning_rate=0.01, clip_norm=0.0)
    return make_optimizer(config, horizon=100, axes=LEAVES)


def values(seed):
    tree = random_tree(seed)
    return {"table": tree["table"], "blocks": {name: tree["blocks"][name] for name in LEAVES["blocks"]}}


@pytest.mark.parametrize(("field", "power", "levels"), [("mu", 2, 127), ("nu", 4, 255)])
def test_a_quantised_moment_is_within_a_step_and_without_bias(field, power, levels):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 96)) * 10.0 ** rng.uniform(-3, 1, (3, 96))).astype(np.float32)
    x = x**2 if field == "nu" else x
    x[1] = 0  # a block of zeros has no scale to divide by
    draws = rng.integers(0, 2**16, (400, *x.shape), dtype=np.uint16)
    stored = jax.vmap(lambda entropy: dequantize(quantize(jnp.asarray(x), field, entropy), field))(draws)
    largest = np.abs(x).max(axis=1, keepdims=True)
    # Between the codes around a value; between three where it is within rounding of a code.
    code = levels * (np.abs(x) / np.where(largest > 0, largest, 1)) ** (1 / power)
    at = lambda code: (np.maximum(code, 0) / levels) ** power
    step = largest * (at(np.floor(code + 1e-3) + 1) - at(np.floor(code - 1e-3)))
    assert (np.abs(stored - x) <= step * 1.001).all()
    # A mean of 400 draws of a variable within one step has a standard error below step / 40; 5 of them. Second moments
    # between 0 and the first code are rounded up.
    above_first = (field == "mu") | (code >= 1) | (x == 0)
    assert (np.abs(np.mean(stored, axis=0) - x) <= step / 8)[above_first].all()
    np.testing.assert_array_equal(stored[:, 1], 0)
    if field == "nu":
        assert (np.asarray(stored)[:, x > 0] > 0).all(), "an update would be divided by 0"


def test_stored_values_are_quantised_to_themselves():
    """A block keeps its scale, because its largest value has the largest code."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 64)), jnp.float32)
    once = quantize(x, "mu", jnp.full(x.shape, 2**15, jnp.uint16))
    again = quantize(dequantize(once, "mu"), "mu", jnp.full(x.shape, 2**15, jnp.uint16))
    np.testing.assert_array_equal(again.codes, once.codes)
    np.testing.assert_array_equal(again.scales, once.scales)


def test_bfloat16_moments_are_rounded_without_bias():
    value, rows = np.float32(1 + 2**-10), 4096  # a quarter of the way between two neighbours in bfloat16
    identity = optax.GradientTransformation(
        lambda params: optax.ScaleByLionState(jnp.int32(0), params),
        lambda grads, state, params: (grads, optax.ScaleByLionState(state.count + 1, grads)),
    )
    stored = store_moments(identity, "bfloat16", {"w": ("embed",)})
    grads = {"w": jnp.full(rows, value)}
    moments = np.asarray(stored.update(grads, stored.init(grads))[1].mu["w"], np.float32)
    assert set(moments) == {1.0, 1 + 2**-7}
    # 1/8 of 4,096 draws: standard deviation 21
    assert abs(np.sum(moments > 1) - rows / 8) < 5 * 21


def test_blocks_lie_along_an_axis_that_is_not_sharded_over_fsdp():
    blocks = {name: AXES["blocks"][name][block_axis(AXES["blocks"][name])] for name in ("up", "down", "out", "query")}
    assert blocks == {"up": "mlp", "down": "mlp", "out": "head_dim", "query": "head_dim"}
    assert block_axis(AXES["table"]) == 1 and block_axis(AXES["norm"]) == 0
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 256, 3)), jnp.float32)
    entropy = jnp.full(x.shape, 2**15, jnp.uint16)
    along, last = quantize(x, "mu", entropy, axis=1), quantize(x.swapaxes(1, 2), "mu", entropy.swapaxes(1, 2))
    assert along.scales.shape == (2, 2, 3)
    np.testing.assert_array_equal(along.codes, last.codes.swapaxes(1, 2))
    np.testing.assert_array_equal(dequantize(along, "mu", axis=1), dequantize(last, "mu").swapaxes(1, 2))


@pytest.mark.parametrize("size", [1, 10, 64, 127, 768, 1600, 4096, 50304])
def test_blocks_divide_the_axis(size):
    assert size % block_size(size) == 0 and block_size(size) <= 128


@pytest.mark.parametrize(
    ("name", "moment_dtype"),
    [
        ("adamw", "int8"),
        pytest.param("adamw", "bfloat16", marks=pytest.mark.slow),
        pytest.param("lion", "int8", marks=pytest.mark.slow),
    ],
)
def test_sharded_updates_equal_unsharded_ones_bitwise(name, moment_dtype):
    """Blocks, scales and draws depend on the position of a parameter, not on the mesh; the moments are sharded."""
    optimizer = make(moment_dtype, name)
    gradients = [values(seed) for seed in range(1, STEPS + 1)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    with use_mesh(mesh):
        params = values(0)
        of_params = shardings(LEAVES, params)
        of_state = shardings(optimizer.state_axes(params), jax.eval_shape(optimizer.init, params))
        params = jax.device_put(params, of_params)
        state = jax.jit(optimizer.init, out_shardings=of_state)(params)
        update = jax.jit(optimizer.update, out_shardings=(of_params, of_state, None))
        for grads in gradients:
            params, state, _ = update(jax.device_put(grads, of_params), state, params)
    expected = run(optimizer, values(0), gradients)
    jax.tree.map(np.testing.assert_array_equal, (params, state), expected)
    share = max(
        sum(s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == device)
        for device in jax.devices()
    )
    # Only the scales of the table are replicated: it has one block along "embed".
    assert share < 0.14 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_quantised_moments_are_restored_and_continue_bitwise(tmp_path):
    optimizer = make("int8")
    update = jax.jit(optimizer.update)
    params, state, _ = update(values(1), optimizer.init(values(0)), values(0))
    checkpoints = Checkpoints(tmp_path)
    saved = checkpoints.save(1, {"params": params, "opt_state": state}, {})
    checkpoints.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), (params, state))
    restored = checkpoints.restore(1, dict(zip(("params", "opt_state"), abstract, strict=True)))
    checkpoints.close()
    assert fingerprint(**restored.parts) == saved
    again = update(values(2), restored.parts["opt_state"], restored.parts["params"])
    jax.tree.map(np.testing.assert_array_equal, again, update(values(2), state, params))


def test_float32_moments_are_the_default_of_float32_parameters():
    gradients = [values(seed) for seed in range(1, STEPS + 1)]
    (params, state), (expected, expected_state) = (
        run(make(dtype), values(0), gradients) for dtype in ("float32", None)
    )
    jax.tree.map(np.testing.assert_array_equal, (params, state), (expected, expected_state))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), values(0))
    dtypes = lambda dtype: {leaf.dtype for leaf in jax.tree.leaves(make(dtype).init(half)["inner"]) if leaf.ndim}
    assert dtypes("float32") == {jnp.dtype("float32")} and dtypes(None) == {jnp.dtype("bfloat16")}


def test_bytes_per_parameter():
    """Parameter and gradient take 8; int8 has 4 more bytes for each block of 128 in both moments."""
    model = DecoderConfig(vocab_size=512, embed=256)
    bytes_with = lambda dtype: count.state_bytes_per_parameter(model, OptimizerConfig(moment_dtype=dtype))
    assert [bytes_with(dtype) for dtype in ("float32", "bfloat16", "int8")] == pytest.approx(
        [16, 12, 8 + 2 * (1 + 4 / 128)], rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment_dtype", ["bfloat16", "int8"])
def test_what_fewer_bits_cost_in_loss(moment_dtype):
    """100 steps on sequences with a constant difference modulo the vocabulary, which the model learns to continue."""
    train = lambda dtype: train_on_progressions(
        LLAMA, OptimizerConfig(moment_dtype=dtype, learning_rate=1e-2), steps=100
    )
    found, expected = train(moment_dtype), train(None)
    assert np.mean(expected[-10:]) < expected[0] - 1
    # tools/moment_table.py finds differences below 0.01 between types, and three times as large ones between seeds.
    assert abs(np.mean(found[-10:]) - np.mean(expected[-10:])) < 0.05
