"""Kinds of parameters by axes, and three steps with stacked blocks equal three with every layer on its own."""

import jax
import numpy as np
import pytest

from llmjax.optim.config import DEFAULTS, OptimizerConfig
from llmjax.optim.layerwise import kind, matrix_dims, matrix_view
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
        (("seq", "embed"), "table"),
        ((None, "embed"), "table"),
        (("embed", "vocab"), "head"),
        (("layers", "embed", "kv_heads", "head_dim"), "matrix"),
        (("layers", "heads", "head_dim", "embed"), "matrix"),
        (("layers", "embed", "mlp"), "matrix"),
        (("embed", "mlp"), "matrix"),
    ],
)
def test_kind(axes, expected):
    assert kind(axes) == expected


def test_matrix_view_merges_heads():
    query, out = ("layers", "embed", "heads", "head_dim"), ("layers", "heads", "head_dim", "embed")
    assert matrix_dims(query) == ((1,), (2, 3))
    assert matrix_dims(out) == ((1, 2), (3,))
    assert matrix_view((3, 8, 2, 5), query) == ((3, 8, 10), ("layers", "embed", "heads"))
    assert matrix_view((3, 2, 5, 8), out) == ((3, 10, 8), ("layers", "heads", "embed"))
    assert matrix_view((3, 2, 5), ("layers", "heads", "head_dim")) == ((3, 10), ("layers", "heads"))


@pytest.mark.parametrize("name", DEFAULTS)
def test_stacked_equals_unstacked(name):
    config = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.1, ema_decay=0 if "free" in name else 0.9)
    params, gradients = random_tree(0), [random_tree(seed, scale=0.1) for seed in (1, 2, 3)]
    stacked, state = run(make_optimizer(config, horizon=10, axes=AXES), params, gradients)
    optimizer = make_optimizer(config, horizon=10, axes=UNSTACKED_AXES)
    alone, alone_state = run(optimizer, unstack(params), [unstack(g) for g in gradients])

    def check(got, want, before):
        # Relative to how far the three steps moved: sums in another order differ by float32 rounding, which Muon's five
        # iterations of slope 3.4 at zero amplify; a statistic shared across the layers is wrong by half or more.
        moved = np.abs(np.asarray(want) - before).max()
        assert moved > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * moved)

    jax.tree.map(check, unstack(stacked), alone, unstack(params))
    evaluated = make_optimizer(config, horizon=10, axes=AXES).evaluated(stacked, state)
    jax.tree.map(check, unstack(evaluated), optimizer.evaluated(alone, alone_state), unstack(params))
