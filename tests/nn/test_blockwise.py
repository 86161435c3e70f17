"""Blockwise attention against the reference `dot`: values, gradients, isolation of documents, work and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn import attention, stack
from llmjax.nn.blockwise import block_mask, blockwise, cross_block_mask

BLOCK = 16


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def packed(*rows: list[int], seq: int) -> tuple[jax.Array, jax.Array]:
    """Segments and positions [rows, seq] of documents with these lengths, then padding."""
    segments, positions = np.zeros((2, len(rows), seq), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths, 1):
            segments[row, at : at + length] = number
            positions[row, at : at + length] = np.arange(length)
            at += length
    return jnp.asarray(segments), jnp.asarray(positions)


# Documents of one token, that end at a block's border, that span three blocks, and a row of padding alone; rows whose
# length is no multiple of the block.
ROWS = packed([1, 15, 16, 1, 50, 30], [113], [], [3, 60, 2, 40], seq=113)


def both_ways(segments, positions, *, causal=True, prefix=None, window=None, options=None, kv_heads=2, value_dim=5):
    """(value, gradients) of a weighted sum over the scored outputs, by `dot` and by `blockwise`."""
    batch, seq = segments.shape
    arguments = draw_inputs(batch, seq, seq, kv_heads=kv_heads, value_dim=value_dim)
    options = dict(options or {})
    if "sinks" in options:
        arguments["sinks"] = options.pop("sinks")
    rule = dict(causal=causal, prefix=prefix, window=window)
    reference = attention.attention_mask(segments, positions, **rule)
    mask = block_mask(segments, positions, **rule, block=BLOCK)
    run = lambda kernel, mask: value_and_grads(
        lambda arguments: kernel(mask=mask, **arguments, **options), arguments, segments > 0
    )
    return run(attention.dot, reference), run(blockwise, mask)


def draw_inputs(batch: int, s: int, t: int, *, kv_heads: int = 2, value_dim: int = 5) -> dict[str, jax.Array]:
    return {
        "q": draw(batch, s, 4, 8),
        "k": draw(batch, t, kv_heads, 8, seed=1),
        "v": draw(batch, t, kv_heads, value_dim, seed=2),
    }


def value_and_grads(function, arguments, scored):
    """The output where `scored` [batch, s], and the gradients of a weighted sum over it."""
    scored = scored[:, :, None, None]

    def total(arguments):
        out = function(arguments)
        return jnp.sum(draw(*out.shape, seed=3) * scored * out), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(arguments)
    return np.where(scored, out, 0), grads


def assert_same(results) -> None:
    # The same float32 sums of up to 113 terms of size 1 in another order: some 1e-6; gradients add 4 heads and rows.
    for expected, actual in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.9},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": jnp.array([-2.0, 0.0, 3.0, 200.0])},
    "all": {"scale": 0.9, "softcap": 5.0, "sinks": jnp.array([-2.0, 0.0, 3.0, 1.0])},
}


@pytest.mark.parametrize(("window", "options"), [*((20, name) for name in OPTIONS), (None, "all"), (1, "all")])
@pytest.mark.parametrize("kind", ["causal", "prefix", "bidirectional"])
def test_equals_dot_in_values_and_gradients(kind, window, options):
    prefix = ROWS[1] < 7 if kind == "prefix" else None
    assert_same(
        both_ways(*ROWS, causal=kind != "bidirectional", prefix=prefix, window=window, options=OPTIONS[options])
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 15, 16, 17, 48])
def test_any_length_and_any_number_of_key_heads(seq, kv_heads):
    assert_same(both_ways(*packed([seq // 3, seq - seq // 3], seq=seq), kv_heads=kv_heads, value_dim=8))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq", [30, 48])
def test_bias_by_distance(seq, causal):
    """Each head has a bias for each distance, such as T5's; its gradient sums over rows and equal distances."""
    segments, positions = packed([seq - 3], [seq // 2, seq // 2], seq=seq)
    arguments = {**draw_inputs(2, seq, seq), "bias": draw(4, 2 * seq - 1, seed=4)}
    mask = attention.attention_mask(segments, positions, causal=causal)
    distance = seq - 1 + jnp.arange(seq)[None, :] - jnp.arange(seq)[:, None]

    def reference(arguments):
        return attention.dot(**{**arguments, "bias": arguments["bias"][None, :, distance]}, mask=mask, scale=0.7)

    blocks = block_mask(segments, positions, causal=causal, block=BLOCK)
    actual = value_and_grads(lambda arguments: blockwise(**arguments, mask=blocks, scale=0.7), arguments, segments > 0)
    assert_same((value_and_grads(reference, arguments, segments > 0), actual))


def test_cross_attention_sees_the_source_of_its_segment():
    """Sources longer and shorter than targets; segment 2 of row 0 has no source, and gets 0."""
    segments, _ = packed([20, 10, 7], [5, 30], seq=40)
    source, _ = packed([50, 1, 20], [40, 30], seq=75)
    source = jnp.where(source == 2, jnp.where(jnp.arange(2)[:, None] == 0, 3, 2), source)
    arguments = draw_inputs(2, 40, 75)
    mask = segments[:, :, None] == source[:, None, :]
    has_source = jnp.any(mask, axis=-1) & (segments > 0)
    assert 0 < has_source.sum() < (segments > 0).sum()
    blocks = cross_block_mask(segments, source, block=BLOCK)
    results = (
        value_and_grads(lambda arguments: attention.dot(**arguments, mask=mask), arguments, has_source),
        value_and_grads(lambda arguments: blockwise(**arguments, mask=blocks), arguments, has_source),
    )
    assert_same(results)
    out = blockwise(**arguments, mask=blocks)
    assert not out[np.asarray(~has_source)].any()
    grads = jax.grad(lambda arguments: jnp.sum(blockwise(**arguments, mask=blocks)))(arguments)
    assert not grads["q"][np.asarray(~has_source)].any() and all(np.isfinite(x).all() for x in grads.values())


def test_documents_do_not_see_each_other():
    """Enormous keys and values of one document change no bit of another's outputs and gradients."""
    segments, positions = packed([20, 30, 40], seq=100)
    mask = block_mask(segments, positions, causal=True, block=BLOCK)
    q, k, v = (draw(1, 100, 2, 8, seed=seed) for seed in range(3))
    middle = (segments == 2)[:, :, None, None]

    def result(k, v):
        scored = lambda *args: jnp.sum(jnp.where(middle, 0, blockwise(*args, mask)))
        out, grads = blockwise(q, k, v, mask), jax.grad(scored, (0, 1, 2))(q, k, v)
        return [np.asarray(jnp.where(middle, 0, x)) for x in (out, *grads)]

    changed = result(jnp.where(middle, 1e4 * k, k), jnp.where(middle, -1e6, v))
    jax.tree.map(np.testing.assert_array_equal, changed, result(k, v))


@pytest.mark.parametrize(
    ("rows", "rule", "ranges"),
    [
        ([[64]], {}, [(0, 1), (0, 2), (0, 3), (0, 4)]),
        ([[64]], {"window": 16}, [(0, 1), (0, 2), (1, 3), (2, 4)]),
        ([[64]], {"causal": False}, [(0, 4)] * 4),
        ([[64]], {"causal": False, "window": 16}, [(0, 2), (0, 3), (1, 4), (2, 4)]),
        ([[16, 16, 32]], {}, [(0, 1), (1, 2), (2, 3), (2, 4)]),
        ([[16, 16, 32], [20, 44]], {}, [(0, 1), (0, 2), (1, 3), (1, 4)]),
    ],
)
def test_blocks_without_a_visible_key_are_left_out(rows, rule, ranges):
    mask = block_mask(*packed(*rows, seq=64), **{"causal": True, **rule}, block=BLOCK)
    assert list(zip(mask.first.tolist(), mask.last.tolist(), strict=True)) == ranges


def temporary_bytes(kernel, make_mask, seq: int) -> int:
    def total(q, segments, positions):
        return jnp.sum(kernel(q, q, q, make_mask(segments, positions, causal=True)))

    q, rows = draw(1, seq, 2, 8), packed([seq], seq=seq)
    compiled = jax.jit(jax.grad(total)).lower(q, *rows).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    """By the compiler's own account: 4 times the length takes at most 4 times the memory; dot tends to 16."""
    short, long = (temporary_bytes(blockwise, block_mask, seq) for seq in (1024, 4096))
    assert long <= 4 * short
    dot_long = temporary_bytes(attention.dot, attention.attention_mask, 4096)
    assert dot_long > 8 * temporary_bytes(attention.dot, attention.attention_mask, 1024)
    assert long < dot_long / 20


@pytest.mark.parametrize(("remat", "forwards"), [("attention", 1), ("full", 2)])
def test_remat_that_keeps_attention_computes_it_once(remat, forwards):
    """Loops over key blocks in the gradient's program: one a forward pass, and one of the backward pass."""
    segments, positions = packed([64], seq=64)
    mask = block_mask(segments, positions, causal=True, block=BLOCK)
    layer = jax.checkpoint(lambda x: blockwise(2 * x, x, x, mask), policy=stack.REMAT[remat])
    program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)))))(draw(1, 64, 2, 8))
    assert str(program).count("while[") == forwards + 1


def test_bfloat16_keeps_a_float32_softmax():
    """Against float32 `dot` of the same numbers: one rounding of the weights and one of the output, 2^-8 each."""
    q, k, v = (draw(4, 113, heads, 8, seed=seed).astype(jnp.bfloat16) for seed, heads in ((0, 4), (1, 2), (2, 2)))
    mask = block_mask(*ROWS, causal=True, block=BLOCK)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = attention.dot(*wide, attention.attention_mask(*ROWS, causal=True))
    actual = blockwise(q, k, v, mask)
    assert actual.dtype == jnp.bfloat16
    scored = np.asarray(ROWS[0] > 0)
    np.testing.assert_allclose(np.asarray(actual, np.float32)[scored], np.asarray(expected)[scored], atol=2**-6)
