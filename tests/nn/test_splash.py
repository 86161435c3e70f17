"""Splash attention, interpreted on CPU, against the reference `dot`: values, gradients, layouts, number of calls."""

import dataclasses
import functools
import itertools

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
import numpy as np
import pytest

from llmjax.nn import attention, kernels, splash as splash_module, stack
from llmjax.nn.blockwise import block_mask, blockwise
from llmjax.nn.splash import LANES, _block, _divisor, _head_mask, _places, cross_splash_mask, splash, splash_mask
from llmjax.parallel import axes
from tests import batches
from tests.nn.test_blockwise import draw, packed, value_and_grads

# Documents of one token, that end at a block's border or span both blocks; padding; no multiple of the block.
SEQ = 157
ROWS = packed([1, 100, 27, 1, 20], [60, 3, 90], seq=SEQ)
AXES = ("data", "fsdp", "tensor")
SINKS = jnp.array([-2.0, 0.0, 3.0, 1.0])


def draw_inputs(batch: int, s: int, t: int, *, kv_heads: int = 2, value_dim: int = 12) -> dict[str, jax.Array]:
    return {
        "q": draw(batch, s, 4, 8),
        "k": draw(batch, t, kv_heads, 8, seed=1),
        "v": draw(batch, t, kv_heads, value_dim, seed=2),
    }


def assert_same(actual, expected) -> None:
    # The same float32 sums of up to 157 terms of size 1 in another order: some 1e-6; gradients of keys and values add
    # the heads of a group and reach 10.
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ({"causal": True}, {"scale": 0.9}),
        ({"causal": False, "window": 30}, {}),
        ({"causal": True, "window": 30}, {"softcap": 1.5, "sinks": SINKS}),
    ],
    ids=["causal", "bidirectional, window", "causal, window, soft-cap, sinks"],
)
def test_equals_dot_in_values_and_gradients(rule, options):
    """Grouped query heads, values of another width, packed rows of an odd length."""
    options, inputs = dict(options), draw_inputs(2, SEQ, SEQ)
    if "sinks" in options:
        inputs["sinks"] = options.pop("sinks")
    run = lambda kernel, mask: value_and_grads(
        lambda inputs: kernel(**inputs, **options, mask=mask), inputs, ROWS[0] > 0
    )
    expected = run(attention.dot, attention.attention_mask(*ROWS, **rule))
    assert_same(run(splash, splash_mask(*ROWS, **rule, block=LANES)), expected)


def test_long_rows_have_a_kernel_for_the_gradient_of_queries(monkeypatch):
    """Equal to that of the kernel that computes all gradients, for which a row of 157 tokens has too many blocks."""
    monkeypatch.setattr(splash_module, "_MAX_PARTS", 1)
    inputs, scored = draw_inputs(2, SEQ, SEQ), ROWS[0] > 0
    mask = splash_mask(*ROWS, causal=True, window=30, block=LANES)
    run = lambda kernel, mask: value_and_grads(lambda inputs: kernel(**inputs, mask=mask), inputs, scored)
    expected = run(attention.dot, attention.attention_mask(*ROWS, causal=True, window=30))
    assert_same(run(splash, mask), expected)
    text = lower_for_tpu(jax.grad(lambda q: jnp.sum(splash(**{**inputs, "q": q}, mask=mask))), inputs["q"])
    assert 'kernel_name = "splash_mha_dq' in text


@pytest.mark.parametrize("window", [None, 30])
def test_rows_of_one_segment_need_no_segments(window):
    """Without them, `dot`, blockwise and splash give text what `dot` gives it with them; padding ends the rows."""
    rows, inputs, rule = packed([140], [3], seq=SEQ), draw_inputs(2, SEQ, SEQ), {"causal": True, "window": window}
    masks = {
        attention.dot: attention.attention_mask(None, rows[1], **rule),
        blockwise: block_mask(None, rows[1], **rule, block=16),
        splash: splash_mask(None, rows[1], **rule, block=LANES),
    }
    run = lambda kernel, mask: value_and_grads(lambda inputs: kernel(**inputs, mask=mask), inputs, rows[0] > 0)
    expected = run(attention.dot, attention.attention_mask(*rows, **rule))
    for kernel, mask in masks.items():
        assert_same(run(kernel, mask), expected)


def test_cross_attention_sees_the_source_of_its_segment():
    """A source longer than the targets; segment 2 has no source, is finite and sends no gradient."""
    segments, _ = packed([20, 10, 7], seq=40)
    source, _ = packed([90, 60], seq=160)
    source = jnp.where(source == 2, 3, source)
    inputs, has_source = draw_inputs(1, 40, 160, kv_heads=4), (segments == 1) | (segments == 3)
    mask = segments[:, :, None] == source[:, None, :]
    expected = value_and_grads(lambda inputs: attention.dot(**inputs, mask=mask), inputs, has_source)
    blocks = cross_splash_mask(segments, source, block=LANES)
    assert_same(value_and_grads(lambda inputs: splash(**inputs, mask=blocks), inputs, has_source), expected)


@pytest.mark.parametrize("local", [True, False])
def test_a_traced_flag_selects_the_window(local):
    mask = lambda local: kernels.Mask(
        splash_mask(*ROWS, causal=True, window=5 if local else None, block=LANES), "splash"
    )
    inputs = draw_inputs(2, SEQ, SEQ)
    run = jax.jit(lambda inputs, flag: stack.select(stack.by_kind(mask, (False, True)), flag).attend(**inputs))
    expected = attention.dot(**inputs, mask=attention.attention_mask(*ROWS, causal=True, window=5 if local else None))
    scored = np.asarray(ROWS[0] > 0)
    assert_same(run(inputs, local)[scored], expected[scored])


@pytest.mark.parametrize("kv_rule", ["tensor", None])
def test_mesh(kv_rule):
    """Rows over data and fsdp, heads over tensor. Where key heads are not sharded, each device takes its own."""
    mesh = Mesh(mesh_utils.create_device_mesh((2, 2, 2)), AXES, axis_types=(AxisType.Auto,) * 3)
    rows = packed([100, 28], [1, 60, 20], [128], [], seq=128)
    inputs = {**draw_inputs(4, 128, 128), "sinks": SINKS}
    expected = value_and_grads(
        lambda inputs: attention.dot(**inputs, mask=attention.attention_mask(*rows, causal=True)), inputs, rows[0] > 0
    )
    with axes.use_mesh(mesh, axes.complete_rules((("kv_heads", kv_rule),))):
        run = lambda inputs: splash(**inputs, mask=splash_mask(*rows, causal=True))
        assert_same(value_and_grads(run, inputs, rows[0] > 0), expected)


def test_pmap():
    """Each replica computes its own rows."""
    rows = packed([100, 28], [60, 68], seq=128)
    q, k, v = (draw(2, 128, 2, 8, seed=seed) for seed in range(3))
    mask = attention.attention_mask(*rows, causal=True)
    run = lambda q, k, v, segments: splash(q, k, v, splash_mask(segments, segments, causal=True))
    split = lambda x: x[:, None]
    out = jax.pmap(run)(*map(split, (q, k, v, rows[0])))
    assert_same(out[:, 0], attention.dot(q, k, v, mask))


def lower_for_tpu(function, *arguments) -> str:
    """The program for an absent TPU, before XLA."""
    device = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("windows", [(None,), (None, 5)])
@pytest.mark.parametrize(("remat", "forwards"), [("attention", 1), ("full", 2)])
def test_remat_that_keeps_attention_computes_it_once(remat, forwards, windows):
    """Calls of the kernels in the gradient's program for TPU: one for each window, forward and backward."""
    rows = packed([200], seq=200)
    kinds = {bool(i): splash_mask(*rows, causal=True, window=window) for i, window in enumerate(windows)}

    def layer(x, flag):
        return jnp.sin(splash(2 * x, x, x, stack.select(kinds, flag))), None

    def total(x):
        return jnp.sum(stack.run(layer, x, jnp.array([True, False]), scan=True, remat=remat)[0])

    text = lower_for_tpu(jax.grad(total), draw(1, 200, 2, 8))
    assert text.count('kernel_name = "splash_mha_fwd') == forwards * len(windows)
    assert text.count('kernel_name = "splash_mha_dkv') == len(windows)


def test_the_platform_is_that_of_the_mesh():
    assert axes.device().platform == "cpu"
    assert "tpu_custom_call" in lower_for_tpu(
        lambda x: splash(x, x, x, splash_mask(*packed([200], seq=200), causal=True)), draw(1, 200, 2, 8)
    )


@pytest.mark.parametrize("one_segment", [False, True])
def test_only_batches_that_promise_one_segment_go_without_segments(one_segment):
    """The kernel's name says whether it reads them: by the promise alone, which the compiler sees, not by the rows."""
    batch = dataclasses.replace(batches.packed(1, 200, 10), one_segment=one_segment)
    run = lambda x, batch: splash(x, x, x, splash_mask(batch.causal_segments, batch.positions, causal=True))
    text = lower_for_tpu(run, draw(1, 200, 2, 8), batch)
    assert ("segmented" in text) is not one_segment


def test_masks_are_those_of_the_reference():
    """Block by block, in the order of the row and with the chunks of two devices; whole blocks come as one element."""
    order = (0, 3, 2, 1)
    for causal, window in ((True, None), (True, 40), (False, 40)):
        for places in (_places(96, 96, ()), _places(48, 64, order)):
            mask = _head_mask(places, 128, causal, window)
            positions = places.reshape(-1)
            distance = positions[:, None] - np.arange(128)
            expected = (distance >= 0) | (not causal)
            expected &= np.abs(distance) < (window or 1000)
            for rows, columns in itertools.product(range(0, len(positions), 32), range(0, 128, 32)):
                index = slice(rows, rows + 32), slice(columns, columns + 32)
                np.testing.assert_array_equal(np.broadcast_to(mask[index], (32, 32)), expected[index])
    assert _places(4, 6, order).tolist() == [[0, 1, 6, 7, 7, 7], [4, 5, 2, 3, 3, 3]]


def test_blocks_are_equal_and_little_is_padded():
    blocks = functools.partial(_block, largest=1024)
    assert [blocks(seq) for seq in (1, 128, 1000, 1024, 1025, 2100, 8192)] == [128, 128, 1024, 1024, 640, 768, 1024]
    assert [_divisor(block, 512) for block in (128, 384, 640, 1024, 768)] == [128, 384, 128, 512, 384]
