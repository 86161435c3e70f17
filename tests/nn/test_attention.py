"""The gradients of `dot`, which are written out, against those that JAX derives; and the matmuls that a CPU runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.attention import attention_mask, dot
from llmjax.nn.blockwise import block_mask, blockwise
from llmjax.nn.linear import project

BATCH, SEQ, HEADS, GROUPS, HEAD_DIM, VALUE_DIM = 2, 12, 4, 2, 8, 6
SEGMENTS = jnp.array([[1] * 5 + [2] * 6 + [0], [1] * 12])
POSITIONS = jnp.array([[*range(5), *range(6), 0], [*range(12)]])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def inputs() -> dict[str, jax.Array]:
    return {
        "q": normal(0, BATCH, SEQ, HEADS, HEAD_DIM),
        "k": normal(1, BATCH, SEQ, GROUPS, HEAD_DIM),
        "v": normal(2, BATCH, SEQ, GROUPS, VALUE_DIM),
        "sinks": normal(3, HEADS),
        "bias": normal(4, 1, HEADS, SEQ, SEQ),
    }


def softmax_attention(q, k, v, mask, *, scale=None, softcap=None, sinks=None, bias=None):
    """Attention by jax.nn.softmax, with repeated keys and values and a sink as one more column."""
    k, v = (jnp.repeat(x, HEADS // GROUPS, axis=2) for x in (k, v))
    scores = jnp.einsum("bshd,bthd->bhst", q, k) * (HEAD_DIM**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores)[..., :SEQ], v)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "softcap": 2.0}, {"sinks": True}, {"bias": True}])
def test_dot_has_the_gradients_that_jax_derives_on_packed_rows(options):
    options, arrays = dict(options), inputs()
    learned = {name: arrays.pop(name) for name in ("sinks", "bias")}
    arrays |= {name: learned[name] for name in learned if options.pop(name, False)}
    mask, weights = attention_mask(SEGMENTS, POSITIONS, causal=True), normal(5, BATCH, SEQ, HEADS, VALUE_DIM)

    def value_and_gradient(attention_fn):
        loss = lambda arrays: jnp.sum(weights * attention_fn(mask=mask, **arrays, **options))
        return jax.jit(jax.value_and_grad(loss))(arrays)

    # Float32 sums of at most a few hundred products of numbers around 1.
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, value_and_gradient(dot), value_and_gradient(softmax_attention))


def transposed_left_operands(function, *arguments) -> list[str]:
    """The batched matmuls of the program compiled for a CPU whose left operand is not [..., rows, contracted]."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = []
    for line in text.splitlines():
        match = re.search(r" dot\(.*?(?:lhs_batch_dims=\{([\d,]*)\}, )?lhs_contracting_dims=\{(\d+)\}", line)
        if match and int(match[2]) != len((match[1] or "").split(",")) * bool(match[1]) + 1:
            found.append(line.strip())
    return found


@pytest.mark.parametrize("name", ["dot", "blockwise"])
def test_attention_has_no_matmul_with_a_transposed_left_operand_on_cpu(name):
    shape = (2, 256, 2, 32)
    q, k, v, d_out = (normal(seed, *shape) for seed in range(4))
    segments, positions = jnp.ones(shape[:2], jnp.int32), jnp.broadcast_to(jnp.arange(shape[1]), shape[:2])

    def gradient(q, k, v, d_out, segments, positions):
        if name == "dot":
            attention_fn, mask = dot, attention_mask(segments, positions, causal=True)
        else:
            attention_fn, mask = blockwise, block_mask(segments, positions, causal=True, block=128)
        return jax.vjp(lambda *qkv: attention_fn(*qkv, mask), q, k, v)[1](d_out)

    assert transposed_left_operands(gradient, q, k, v, d_out, segments, positions) == []


@pytest.mark.parametrize("widths", [((4, 6), (3,)), ((3,), (4, 6)), ((5,), (5,))])
def test_project_has_the_gradients_that_jax_derives(widths):
    first, last = widths
    x, weight, factor = normal(0, 2, 7, *first), normal(1, *first, *last), normal(2, 2, 7, *last)
    ours = lambda x, weight: jnp.sum(factor * project(x, weight, len(first)))
    plain = lambda x, weight: jnp.sum(factor * jnp.tensordot(x, weight, len(first)))
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(compare, *(jax.jit(jax.grad(f, (0, 1)))(x, weight) for f in (ours, plain)))
