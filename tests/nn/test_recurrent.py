"""Scans over time against plain loops: values, gradients, resets."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn import recurrent
from llmjax.nn.recurrent import CELLS
from llmjax.nn.rglru import CONV_WIDTH, RECURRENCES, RgLru, linear_scan

BATCH, SEQ, HIDDEN = 3, 17, 8


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def resets():
    actual = np.random.default_rng(3).random((SEQ, BATCH)) < 0.2
    actual[0] = True
    return actual


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_of_the_scan_is_that_of_jax(cell):
    """The hand-written order of the backward pass against JAX's differentiation of the plain scan."""
    gates = len(CELLS[cell].gates)
    inputs, weight = drawn(SEQ, BATCH, gates, HIDDEN), 0.4 * drawn(HIDDEN, gates, HIDDEN, seed=1)
    bias, score = drawn(gates, HIDDEN, seed=2), drawn(SEQ, BATCH, HIDDEN, seed=4)

    def plain(inputs, weight, bias):
        state = recurrent.start(cell, BATCH, HIDDEN)
        return recurrent.run(cell, inputs, weight, bias, resets(), state, unroll=1)[0][0]

    scan = functools.partial(recurrent.scan, cell, 4, resets=resets())
    both = []
    for function in (scan, plain):

        def scored(arguments, function=function):
            hidden = function(*arguments)
            return jnp.sum(hidden * score), hidden

        both.append(jax.jit(jax.value_and_grad(scored, has_aux=True))((inputs, weight, bias)))
    ((_, actual), grads), ((_, expected), expected_grads) = both
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def loop(decay, inputs):
    """The linear recurrence in float64, one number at a time."""
    out, state = np.zeros(inputs.shape), np.zeros((inputs.shape[0], inputs.shape[2]))
    for t in range(inputs.shape[1]):
        for row in range(inputs.shape[0]):
            for unit in range(inputs.shape[2]):
                state[row, unit] = float(decay[row, t, unit]) * state[row, unit] + float(inputs[row, t, unit])
        out[:, t] = state
    return out


@pytest.mark.parametrize("how", RECURRENCES)
@pytest.mark.parametrize("seq", [1, 2, 13, 64])
def test_the_linear_recurrence_equals_a_loop(how, seq):
    decay = np.random.default_rng(0).uniform(0.5, 1.0, (2, seq, 5)).astype(np.float32)
    decay[:, ::6] = 0  # where segments start
    inputs, score = drawn(2, seq, 5, seed=1), drawn(2, seq, 5, seed=2)
    loss = lambda d, x: (jnp.sum(linear_scan(d, x, how) * score), linear_scan(d, x, how))
    (_, actual), (d_decay, d_inputs) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(decay, inputs)
    states = loop(decay, inputs)
    np.testing.assert_allclose(actual, states, rtol=0, atol=2e-6 * np.abs(states).max())
    # The gradient runs the same recurrence from the end: each state's decay is that of the step after it.
    after = np.concatenate([decay[:, 1:], np.zeros_like(decay[:, :1])], 1)
    expected_grads = loop(after[:, ::-1], score[:, ::-1])[:, ::-1]
    before = np.concatenate([np.zeros_like(states[:, :1]), states[:, :-1]], 1)
    np.testing.assert_allclose(d_inputs, expected_grads, rtol=0, atol=2e-6 * np.abs(expected_grads).max())
    np.testing.assert_allclose(
        d_decay, expected_grads * before, rtol=0, atol=4e-6 * np.abs(expected_grads * before).max()
    )


def oracle(p, x, positions, blocks):
    """Griffin's block in float64 as its paper has it, one token and one tap at a time; x [seq, embed]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    sigmoid = lambda y: 1 / (1 + np.exp(-y))
    linear = lambda name, y: y @ p[name]["weight"] + p[name]["bias"]
    entered, branch = linear("input", x), linear("gate", x)
    branch = 0.5 * branch * (1 + np.tanh(np.sqrt(2 / np.pi) * (branch + 0.044715 * branch**3)))
    hidden, h, size = np.zeros_like(entered), np.zeros(entered.shape[1]), entered.shape[1] // blocks
    for t, position in enumerate(positions):
        u = p["conv_bias"] + sum(p["conv"][d] * entered[t - d] for d in range(CONV_WIDTH) if d <= position)
        gate = lambda name, u=u: sigmoid(
            np.concatenate([u[i * size : (i + 1) * size] @ p[name]["weight"][i] for i in range(blocks)])
            + p[name]["bias"]
        )
        a = np.exp(-8 * gate("decay_gate") * np.log1p(np.exp(p["decay"])))
        entering = gate("input_gate") * u
        h = entering if position == 0 else a * h + np.sqrt(1 - a**2) * entering
        hidden[t] = h
    return linear("out", hidden * branch)


@pytest.mark.parametrize("how", RECURRENCES)
def test_griffin_block_equals_the_numpy_oracle(how):
    module = RgLru(jax.random.key(0), 6, HIDDEN, blocks=2, recurrence=how, unroll=1, scale=1.0, dtype="float32")
    graph, state = nnx.split(module)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * drawn(*leaf.shape, seed=5), nnx.to_pure_dict(state))
    positions = np.r_[np.arange(5), np.arange(2), np.arange(10)]
    x = drawn(1, 17, 6)
    actual = nnx.merge(graph, params)(x, jnp.asarray(positions[None]))
    expected = oracle(params, x[0].astype(np.float64), positions, 2)
    np.testing.assert_allclose(actual[0], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_a_decay_of_one_has_a_finite_gradient():
    """Where the gate shuts, sqrt(1 - a^2) has no slope of its own to give."""
    module = RgLru(
        jax.random.key(0), 6, HIDDEN, blocks=1, recurrence="sequential", unroll=1, scale=1.0, dtype="float32"
    )
    graph, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    params["decay_gate"]["bias"] -= 100.0
    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(drawn(1, 9, 6), jnp.arange(9)[None])))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
