"""Every optimizer on fsdp 8: its state follows state_axes, equals that of one device, and is restored bit for bit."""

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llmjax.optim.config import DEFAULTS, OptimizerConfig
from llmjax.optim.optimizer import make_optimizer
from llmjax.parallel.axes import shardings, use_mesh
from tests.optim.parameters import AXES, random_tree, run

STEPS = 3
# Leaves without "embed" are replicated: biases and factored columns over heads or mlp, and counters.
LARGEST_SHARE_OF_A_DEVICE = {"adafactor": 0.25}


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))


def make(name):
    config = OptimizerConfig(name=name, learning_rate=0.01, ema_decay=0.0 if "free" in name else 0.9)
    return make_optimizer(config, horizon=10, axes=AXES)


def sharded_run(optimizer):
    """(params, state, state shardings) after STEPS updates on fsdp 8; the state is created sharded."""
    with use_mesh(mesh()):
        params, gradients = random_tree(0), [random_tree(seed) for seed in range(1, STEPS + 1)]
        of_params = shardings(AXES, params)
        of_state = shardings(optimizer.state_axes(params), jax.eval_shape(optimizer.init, params))
        params = jax.device_put(params, of_params)
        state = jax.jit(optimizer.init, out_shardings=of_state)(params)
        update = jax.jit(optimizer.update, out_shardings=(of_params, of_state, None))
        for grads in gradients:
            params, state, _ = update(jax.device_put(grads, of_params), state, params)
    return params, state, of_state


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_sharded_updates_equal_unsharded_ones_and_are_restored(name, tmp_path):
    optimizer = make(name)
    params, state, of_state = sharded_run(optimizer)

    embed_dims = 0
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.structure(state).flatten_up_to(optimizer.state_axes(params)),
        strict=True,
    ):
        assert len(names) == leaf.ndim, path
        assert leaf.sharding.spec == P(*("fsdp" if axis == "embed" else None for axis in names)), path
        embed_dims += "embed" in names
    assert embed_dims >= len(jax.tree.leaves(AXES, is_leaf=lambda node: isinstance(node, tuple))) - 3

    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for device in jax.devices():
        shards = (s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == device)
        held = sum(shard.data.nbytes for shard in shards)
        assert held < total * LARGEST_SHARE_OF_A_DEVICE.get(name, 0.13), (held, total)

    gradients = [random_tree(seed) for seed in range(1, STEPS + 1)]
    one_device = run(optimizer, random_tree(0), gradients)
    before = random_tree(0)

    def check(updated, expected, start):
        # Relative to the change, and one rounding of the parameter itself. Sums in another order have other roundings,
        # which Muon's iterations amplify (see test_layerwise) and the other optimizers hardly.
        change = np.abs(np.asarray(expected) - start).max()
        np.testing.assert_allclose(updated, expected, rtol=2e-7, atol=(2e-3 if name == "muon" else 2e-4) * change)

    jax.tree.map(check, params, one_device[0], before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), state, one_device[1])

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, of_state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(
        lambda a, b: a.sharding == b.sharding or pytest.fail("restored with another sharding"), restored, state
    )
