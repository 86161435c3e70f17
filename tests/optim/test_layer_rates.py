"""Learning rates by layer, and gradual unfreezing, against a loop over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.layer_rates import layers_below_top
from llmjax.optim.optimizer import make_optimizer
from tests.models.variants import FAMILIES

AXES = {"embed": {"table": ("vocab", "embed")}, "blocks": {"w": ("layers", "embed", "mlp")}, "head": ("embed", "vocab")}
SHAPES = {"embed": {"table": (7, 4)}, "blocks": {"w": (3, 4, 5)}, "head": (4, 7)}
SETTINGS = dict(learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.1)


def arrays(seed: int):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=is_shape)


def change(steps: int = 1, **fields):
    """(the change of the parameters in each of `steps` updates, the last state)"""
    optimizer = make_optimizer(OptimizerConfig(**SETTINGS, **fields), horizon=10, axes=AXES, num_layers=3)
    params, changes, norms = arrays(0), [], []
    state = optimizer.init(params)
    for step in range(steps):
        new, state, info = optimizer.update(arrays(step + 1), state, params)
        changes.append(jax.tree.map(lambda a, b: np.asarray(a - b), new, params))
        norms.append(float(info["grad_norm"]))
        params = new
    return changes, norms, state


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_layers_have_decayed_rates(name):
    (plain,), _, _ = change(name=name)
    (decayed,), _, _ = change(name=name, layer_decay=0.5)
    # Differences of parameters near 1, so one rounding of them each.
    close = lambda actual, expected: np.testing.assert_allclose(actual, expected, atol=3e-7)
    close(decayed["head"], plain["head"])
    close(decayed["embed"]["table"], plain["embed"]["table"] / 16)
    for layer in range(3):
        close(decayed["blocks"]["w"][layer], plain["blocks"]["w"][layer] / 2 ** (3 - layer))


def test_layers_start_to_train_one_after_another():
    changes, norms, state = change(steps=9, unfreeze_every=2)
    for step, moved in enumerate(changes):
        assert moved["head"].any()
        trained = [bool(layer.any()) for layer in moved["blocks"]["w"]]
        assert trained == [step >= 6, step >= 4, step >= 2], step
        assert moved["embed"]["table"].any() == (step >= 8)
    # Before a layer trains, its gradients have no part in the norm, and its moments stay 0.
    assert norms[0] == pytest.approx(float(jnp.linalg.norm(arrays(1)["head"])))
    _, _, early = change(steps=4, unfreeze_every=2)
    moments = [leaf for leaf in jax.tree.leaves(early["inner"]) if leaf.shape == (3, 4, 5)]
    assert len(moments) == 2 and all(not leaf[:2].any() and leaf[2].any() for leaf in moments)
    del state


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"embed.table": 3, "blocks.mlp.up.weight": [2, 1], "norm.scale": 0, "head": 0}),
        ("bert", {"embed.table": 3, "blocks.mlp.up.weight": [2, 1], "pooler.weight": 0}),
        ("deepseek", {"dense_blocks.mlp.up.weight": [3], "blocks.mlp.shared.up.weight": [2, 1]}),
        ("modernbert", {"first.mlp.up.weight": FAMILIES["modernbert"].num_layers}),
        ("t5", {"encoder.blocks.mlp.up.weight": [2, 1], "decoder.blocks.mlp.up.weight": [3, 2, 1]}),
    ],
)
def test_layers_of_families(family, expected):
    config = FAMILIES[family]
    _, shapes, axes = registry.abstract(config)
    below = jax.tree.map(lambda f, leaf: f(leaf.shape), layers_below_top(axes, config.num_layers), shapes)
    for name, value in expected.items():
        leaf = below
        for part in name.split("."):
            leaf = leaf[part]
        assert np.squeeze(leaf).tolist() == np.squeeze(value).tolist(), name


def test_bad_values_are_refused():
    with pytest.raises(UserError, match=r"optimizer.layer_decay=1.5: must be above 0 and at most 1"):
        OptimizerConfig(layer_decay=1.5)
    with pytest.raises(UserError, match=r"optimizer.unfreeze_every=5: .* averages updates"):
        OptimizerConfig(name="schedule_free_adamw", unfreeze_every=5)
