"""The kind of a parameter follows from its axes; stacked layers are updated as separate layers are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.optim.config import DEFAULTS, OptimizerConfig
from llmjax.optim.layerwise import kind, matrix_dims, matrix_view, stack_depth
from llmjax.optim.optimizer import make_optimizer
from tests.optim.parameters import AXES, UNSTACKED_AXES, random_tree, run, unstack


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed",), "vector"),
        (("layers", "embed"), "vector"),
        (("layers", "head_dim"), "vector"),
        (("layers", "heads", "head_dim"), "vector"),
        ((), "vector"),
        (("vocab", "embed"), "table"),
        (("entries", "embed"), "table"),
        ((None, "embed"), "table"),
        (("embed", "vocab"), "head"),
        (("layers", "embed", "kv_heads", "head_dim"), "matrix"),
        (("layers", "heads", "head_dim", "embed"), "matrix"),
        (("layers", "embed", "mlp"), "matrix"),
        (("embed", "mlp"), "matrix"),
        (("layers", "experts", "embed", "mlp"), "matrix"),
        (("experts", "mlp", "embed"), "matrix"),
        (("layers", "experts", "mlp"), "vector"),
        (("layers", "blocks", "head_dim", "embed"), "matrix"),
        (("layers", "embed", "router"), "matrix"),
        (("layers", "router"), "vector"),
        (("layers", "experts"), "expert_bias"),
        (("experts",), "expert_bias"),
    ],
)
def test_the_axes_decide_the_kind(axes, expected):
    assert kind(axes) == expected


def test_the_matrix_view_merges_heads():
    query, out = ("layers", "embed", "heads", "head_dim"), ("layers", "heads", "head_dim", "embed")
    assert matrix_dims(query) == ((1,), (2, 3))
    assert matrix_dims(out) == ((1, 2), (3,))
    assert matrix_view((3, 8, 2, 5), query) == ((3, 8, 10), ("layers", "embed", "heads"))
    assert matrix_view((3, 2, 5, 8), out) == ((3, 10, 8), ("layers", "heads", "embed"))
    assert matrix_view((3, 2, 5), ("layers", "heads", "head_dim")) == ((3, 10), ("layers", "heads"))


def test_each_diagonal_block_is_a_matrix():
    """Each of Griffin's gates is a block-diagonal matrix, stored as [blocks, inputs, outputs]."""
    gate = ("layers", "blocks", "head_dim", "embed")
    assert stack_depth(gate) == 2
    assert matrix_dims(gate) == ((2,), (3,))
    assert matrix_view((3, 4, 12, 12), gate) == ((3, 4, 12, 12), gate)


def test_each_expert_is_a_matrix_of_its_own():
    axes = ("layers", "experts", "embed", "mlp")
    assert matrix_dims(axes) == ((2,), (3,))
    assert matrix_view((3, 4, 8, 5), axes) == ((3, 4, 8, 5), axes)
    assert matrix_view((3, 4, 5), ("layers", "experts", "mlp")) == ((3, 4, 5), ("layers", "experts", "mlp"))


EXPERTS = {"up": ("layers", "experts", "embed", "mlp"), "up_bias": ("layers", "experts", "mlp")}


@pytest.mark.parametrize("name", DEFAULTS)
def test_experts_are_updated_as_layers_are(name):
    """Two layers of three experts are updated as six layers are."""
    config = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.1)
    rng = np.random.default_rng(0)
    draw = lambda: {
        "up": jnp.asarray(rng.normal(size=(2, 3, 128, 136)), jnp.float32),
        "up_bias": jnp.asarray(rng.normal(size=(2, 3, 136)), jnp.float32),
    }
    flat = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), tree)
    params, gradients = draw(), [draw(), draw()]
    optimizer = make_optimizer(config, horizon=10, axes=EXPERTS)
    updated, state = run(optimizer, params, gradients)
    layers = {key: ("layers", *names[2:]) for key, names in EXPERTS.items()}
    expected, _ = run(make_optimizer(config, horizon=10, axes=layers), flat(params), [flat(g) for g in gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), flat(updated), expected)
    is_axes = lambda node: type(node) is tuple and all(name is None or isinstance(name, str) for name in node)
    axes = jax.tree.leaves(optimizer.state_axes(params), is_leaf=is_axes)
    assert [leaf.ndim for leaf in jax.tree.leaves(state)] == [len(names) for names in axes]


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_expert_bias_moves_by_the_sign_of_its_gradient(name):
    """With any optimizer, clipping, decay and schedule; its gradient affects no other parameter."""
    config = OptimizerConfig(name=name, clip_norm=0.1, weight_decay=0.3, expert_bias_update_rate=0.01)
    axes = {"up": ("layers", "embed", "mlp"), "expert_bias": ("layers", "experts")}
    params = {"up": jnp.ones((2, 8, 8)), "expert_bias": jnp.full((2, 3), 5.0)}
    loads = jnp.array([[9e6, -9e6, 0.0], [1e-3, 0.0, -1e-3]])
    grads = [{"up": jnp.full((2, 8, 8), 0.5), "expert_bias": loads * sign} for sign in (1, 1, -1)]
    optimizer = make_optimizer(config, horizon=10, axes=axes)
    updated, state = run(optimizer, params, grads)
    biases = 5 - 0.01 * np.sign(loads)
    np.testing.assert_allclose(updated["expert_bias"], biases, atol=1e-6)
    np.testing.assert_allclose(optimizer.eval_params(updated, state)["expert_bias"], biases, atol=1e-6)
    alone = make_optimizer(config, horizon=10, axes={"up": axes["up"]})
    expected, _ = run(alone, {"up": params["up"]}, [{"up": g["up"]} for g in grads])
    np.testing.assert_allclose(updated["up"], expected["up"], rtol=1e-6)
    _, _, info = optimizer.update(grads[0], optimizer.init(params), params)
    np.testing.assert_allclose(info["grad_norm"], 0.5 * 128**0.5, rtol=1e-6)


@pytest.mark.parametrize("name", DEFAULTS)
def test_stacked_layers_are_updated_as_separate_layers_are(name):
    config = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.1, ema_decay=0 if "free" in name else 0.9)
    params, gradients = random_tree(0), [random_tree(seed, scale=0.1) for seed in (1, 2, 3)]
    stacked, state = run(make_optimizer(config, horizon=10, axes=AXES), params, gradients)
    optimizer = make_optimizer(config, horizon=10, axes=UNSTACKED_AXES)
    alone, alone_state = run(optimizer, unstack(params), [unstack(g) for g in gradients])

    def check(updated, expected, before):
        # Relative to the change of the three steps: sums in another order differ by float32 rounding, which Muon's five
        # iterations of slope 3.4 at zero amplify; a statistic shared across the layers is wrong by half or more.
        change = np.abs(np.asarray(expected) - before).max()
        assert change > 0
        np.testing.assert_allclose(updated, expected, rtol=0, atol=2e-3 * change)

    jax.tree.map(check, unstack(stacked), alone, unstack(params))
    averages = make_optimizer(config, horizon=10, axes=AXES).eval_params(stacked, state)
    jax.tree.map(check, unstack(averages), optimizer.eval_params(alone, alone_state), unstack(params))
