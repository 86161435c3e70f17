"""Updates against float64 numpy oracles and the papers' properties; purity, clipping, decay groups, averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.optim.config import DEFAULTS, OptimizerConfig
from llmjax.optim.layerwise import kind
from llmjax.optim.optimizer import MUON_RMS, make_optimizer
from tests.optim.parameters import AXES, UNSTACKED_AXES, random_tree, run, unstack

STEPS = 4
RATE, DECAY = 0.01, 0.1
KINDS = jax.tree.map(kind, AXES, is_leaf=lambda node: isinstance(node, tuple))


def make(name, **settings):
    settings = (
        dict(learning_rate=RATE, schedule="constant", warmup_steps=1, weight_decay=DECAY, clip_norm=0.0) | settings
    )
    return make_optimizer(OptimizerConfig(name=name, **settings), horizon=100, axes=AXES)


def rate(t):
    """The rate of update t = 1, 2, ... with one step of warmup."""
    return RATE / 2 if t == 1 else RATE


def gradients():
    return [random_tree(seed) for seed in range(1, STEPS + 1)]


def oracle(direction, clip=None):
    """Float64 parameters after STEPS updates of p -= rate * (direction(t, g, memory) + decay * p)."""
    float64 = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    params, memory = float64(random_tree(0)), jax.tree.map(lambda _: {}, KINDS)
    for t, grads in enumerate(map(float64, gradients()), 1):
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        scale = 1.0 if clip is None else min(1.0, clip / norm)

        def one(p, g, kind_of, m, t=t, scale=scale):
            decay = DECAY if kind_of in ("matrix", "head") else 0.0
            return p - rate(t) * (direction(t, g * scale, m) + decay * p)

        params = jax.tree.map(one, params, grads, KINDS, memory)
    return params


def adamw(t, g, m, b1=0.9, b2=0.95, eps=1e-8):
    m["mu"] = b1 * m.get("mu", 0) + (1 - b1) * g
    m["nu"] = b2 * m.get("nu", 0) + (1 - b2) * g**2
    return m["mu"] / (1 - b1**t) / (np.sqrt(m["nu"] / (1 - b2**t)) + eps)


def lion(t, g, m, b1=0.9, b2=0.99):
    mu = m.get("mu", 0)
    m["mu"] = b2 * mu + (1 - b2) * g
    return np.sign(b1 * mu + (1 - b1) * g)


def sgd(t, g, m, momentum=0.9):
    m["trace"] = momentum * m.get("trace", 0) + g
    return m["trace"]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("direction", [adamw, lion, sgd], ids=lambda f: f.__name__)
def test_updates_equal_those_of_a_numpy_oracle(direction, clip):
    params, _ = run(make(direction.__name__, clip_norm=clip or 0.0), random_tree(0), gradients())
    # Float32 rounding of about 10 operations a step on directions of order 1: 1e-5 of a step of 0.01. Lion's sign could
    # flip where its argument rounds through 0; none of these draws does.
    compare = lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
    jax.tree.map(compare, params, oracle(direction, clip))


def test_schedule_free_follows_the_recurrences_of_the_paper():
    b1, b2, eps = 0.9, 0.99, 1e-8
    x = z = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), random_tree(0))
    nu = jax.tree.map(np.zeros_like, x)
    mix = lambda a, b, share: jax.tree.map(lambda u, v: (1 - share) * u + share * v, a, b)
    y, weights = x, 0.0
    for t, grads in enumerate(gradients(), 1):
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * np.asarray(g, np.float64) ** 2, nu, grads)
        z = jax.tree.map(
            lambda z, y, g, n, k, t=t: z
            - rate(t) * (g / (np.sqrt(n / (1 - b2**t)) + eps) + (DECAY if k in ("matrix", "head") else 0) * y),
            z, y, grads, nu, KINDS,
        )  # fmt: skip
        weights += rate(t) ** 2
        x = mix(x, z, rate(t) ** 2 / weights)
        y = mix(z, x, b1)
    optimizer = make("schedule_free_adamw")
    params, state = run(optimizer, random_tree(0), gradients())
    # x is recovered as (y - 0.1 z) / 0.9 in float32 at values up to about 20: a few units of 1e-6.
    compare = lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-6, atol=5e-6)
    jax.tree.map(compare, params, y)
    jax.tree.map(compare, optimizer.eval_params(params, state), x)
    assert optimizer.eval_params_name == "schedule-free average"


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    params, grads = random_tree(0), gradients()[0]
    muon, _ = run(make("muon", weight_decay=0.0), params, [grads])
    adam, _ = run(make("adamw", weight_decay=0.0), params, [grads])
    steps, adam_steps = (jax.tree.map(lambda a, b: np.asarray(b - a) / (RATE / 2), params, new) for new in (muon, adam))
    matrices = {"query": 128, "key": 64, "out": 128, "up": 136, "down": 136}
    for name in steps["blocks"]:
        for layer in range(3):
            step = steps["blocks"][name][layer]
            if name not in matrices:
                np.testing.assert_array_equal(step, adam_steps["blocks"][name][layer])
                continue
            matrix = step.reshape(-1, 128) if name in ("out", "down") else step.reshape(128, -1)
            values = np.linalg.svd(matrix / (MUON_RMS * max(matrix.shape) ** 0.5), compute_uv=False)
            # Five quintic iterations leave singular values in about (0.7, 1.2); only those of square random matrices
            # that started near 0 stay below.
            assert values.max() < 1.3 and np.quantile(values, 0.05) > 0.5
            assert np.sqrt(np.mean(step**2)) == pytest.approx(MUON_RMS * np.sqrt(min(matrix.shape) / 128), rel=0.25)
    for name in ("table", "positions", "norm", "head"):
        np.testing.assert_array_equal(steps[name], adam_steps[name])


def test_adafactor_equals_optax_on_the_matrix_of_each_layer():
    """optax's own adafactor gets queries and outputs as two-dimensional matrices, one layer at a time."""
    flat = lambda tree: {
        f"{block}/{name}": leaf.reshape(128, -1) if name in ("query", "key") else leaf.reshape(-1, 128)
        for block, leaves in unstack(tree).items()
        if block in UNSTACKED_AXES and block.startswith("block")
        for name, leaf in leaves.items()
        if name in ("query", "key", "out", "down")
    }
    params = random_tree(0)
    optimizer = optax.adafactor(lambda count: jnp.where(count == 0, RATE / 2, RATE))
    expected, state = flat(params), optimizer.init(flat(params))
    for grads in gradients():
        updates, state = optimizer.update(flat(grads), state, expected)
        expected = optax.apply_updates(expected, updates)
    updated, our_state = run(make("adafactor", weight_decay=0.0), params, gradients())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), flat(updated), expected)
    query = our_state["inner"][0]["blocks"]["query"][0]
    assert (query.v_row.shape, query.v_col.shape, query.v.shape) == ((3, 128), (3, 128), (3, 1))


@pytest.mark.parametrize("name", DEFAULTS)
def test_weight_decay_follows_the_axes(name):
    params, grads = random_tree(0), gradients()[:1]
    plain, _ = run(make(name, weight_decay=0.0), params, grads)
    decayed, _ = run(make(name, weight_decay=DECAY), params, grads)

    def check(without, with_decay, before, kind_of):
        if kind_of in ("matrix", "head"):
            decay = np.asarray(without - with_decay)
            np.testing.assert_allclose(decay, RATE / 2 * DECAY * np.asarray(before), rtol=0.02, atol=5e-6)
            assert np.abs(decay).max() > 0
        else:
            np.testing.assert_array_equal(without, with_decay)

    jax.tree.map(check, plain, decayed, params, KINDS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_skipped_update_changes_nothing(name):
    """A non-finite update after which the caller keeps the old pair: the result is bitwise that of a run without it."""
    optimizer = make(name, clip_norm=1.0, schedule="cosine", ema_decay=0.0 if "free" in name else 0.9)
    params, grads = random_tree(0), gradients()[:2]

    @jax.jit
    def update_if_finite(grads, state, params):
        new, new_state, info = optimizer.update(grads, state, params)
        keep = lambda old, new: jnp.where(jnp.isfinite(info["grad_norm"]), new, old)
        return jax.tree.map(keep, params, new), jax.tree.map(keep, state, new_state), info

    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), grads[1])
    state, expected_state, updated, expected = optimizer.init(params), optimizer.init(params), params, params
    for step in (grads[0], bad, grads[1]):
        updated, state, _ = update_if_finite(step, state, updated)
    for step in grads:
        expected, expected_state, info = update_if_finite(step, expected_state, expected)
    jax.tree.map(np.testing.assert_array_equal, (updated, state), (expected, expected_state))
    assert int(state["count"]) == 2
    counters = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if str(path[-1]) in ("['count']", ".count")
    ]
    assert len(counters) > 1 and all((np.asarray(counter) == 2).all() for counter in counters)
    assert float(info["learning_rate"]) == float(optimizer.learning_rate(1))


def test_grad_norm_is_measured_before_clipping():
    params, grads = random_tree(0), gradients()[0]
    optimizer = make("sgd", clip_norm=0.5)
    _, _, info = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    squares = [np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)]
    assert float(info["grad_norm"]) == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)


def test_ema_is_a_mean_first_and_then_exponential():
    optimizer = make("sgd", ema_decay=0.6)
    params, state, tables = random_tree(0), optimizer.init(random_tree(0)), []
    for grads in gradients():
        params, state, _ = jax.jit(optimizer.update)(grads, state, params)
        tables.append(np.asarray(params["table"], np.float64))
    assert optimizer.eval_params_name == "EMA of the parameters"
    expected = 0.6 * (0.6 * (tables[0] + tables[1]) / 2 + 0.4 * tables[2]) + 0.4 * tables[3]
    np.testing.assert_allclose(optimizer.eval_params(params, state)["table"], expected, rtol=1e-5, atol=1e-7)


def test_without_an_average_the_parameters_themselves_are_evaluated():
    optimizer, params = make("adamw"), random_tree(0)
    assert optimizer.eval_params(params, optimizer.init(params)) is params
    assert optimizer.eval_params_name == "parameters"
