"""The train step on every mesh, under pmap and with microbatches agrees with one device."""

import dataclasses

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.errors import UserError
from llmjax.models.decoder_config import DecoderConfig
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel import axes, backends
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import state as states
from tests.batches import packed
from tests.train.trainer import ROWS, Trainer, one_device

SEQ, VOCAB = 32, 200
MODEL = DecoderConfig(vocab_size=VOCAB, num_layers=2, embed=32, num_heads=8, num_kv_heads=4, mlp=64, dropout=0.1)
# The schedule, clipping and the EMA all take effect in these steps.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, ema_decay=0.9)


def make_trainer(mesh: Mesh, *, optimizer: OptimizerConfig = OPTIMIZER, **settings) -> Trainer:
    """A trainer of a tiny decoder with packing and dropout."""
    return Trainer(MODEL, optimizer, mesh, **settings)


def batch(step: int):
    return packed(ROWS, SEQ, VOCAB, first_sample=step * ROWS)


@pytest.fixture(scope="module")
def oracle():
    """Three steps on one device: metrics of each, parameters at the end."""
    trainer = make_trainer(one_device())
    metrics = [trainer.step(batch(k)) for k in range(3)]
    return metrics, jax.device_get(trainer.global_state().params)


LAYOUTS = {
    "data 8": (MeshConfig(data=8), "jit", 1),
    "fsdp 8": (MeshConfig(data=1, fsdp=8), "jit", 1),
    "data 2 x tensor 4": (MeshConfig(data=2, tensor=4), "jit", 1),
    "2 x 2 x 2, accumulated": (MeshConfig(data=2, fsdp=2, tensor=2), "jit", 2),
    "pmap 8": (MeshConfig(data=8), "pmap", 1),
    "pmap 8, accumulated": (MeshConfig(data=8), "pmap", 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_device(layout, oracle):
    mesh, backend, accumulation = LAYOUTS[layout]
    trainer = make_trainer(make_mesh(mesh), backend=backend, accumulation=accumulation)
    metrics, params = oracle
    for k, expected in enumerate(metrics):
        result = trainer.step(batch(k))
        assert result["batch_digest"] == expected["batch_digest"]
        assert result["num_targets"] == expected["num_targets"]
        # float32 sums of 16 x 32 terms in another order: a few units in the last place (1.2e-7), compounded over steps.
        np.testing.assert_allclose(result["loss"], expected["loss"], rtol=2e-6)
        np.testing.assert_allclose(result["grad_norm"], expected["grad_norm"], rtol=1e-5)
    # Adam divides by the root of tiny second moments, which magnifies an ulp of the gradient up to the step size of
    # 1e-2: parameters agree to a small part of one update.
    for leaf, expected in zip(jax.tree.leaves(trainer.global_state().params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), expected, atol=2e-4)


def test_every_leaf_but_the_counters_is_sharded():
    with axes.use_mesh(make_mesh(MeshConfig(data=1, fsdp=8))):
        spec = states.make_state_spec(MODEL, OPTIMIZER, horizon=10)
    replicated = [
        jax.tree_util.keystr(path)
        for path, sharding in jax.tree_util.tree_leaves_with_path(spec.shardings)
        if sharding.is_fully_replicated
    ]
    counters = {".step", ".skipped"}
    assert all(name in counters or "count" in name for name in replicated), replicated


def test_a_parameter_that_the_mesh_does_not_divide_is_reported():
    narrow = dataclasses.replace(MODEL, embed=36, num_heads=2, num_kv_heads=2, head_dim=18)
    with axes.use_mesh(make_mesh(MeshConfig(data=1, fsdp=8))):
        lines = states.unsharded_params(states.make_state_spec(narrow, OPTIMIZER, horizon=10))
        assert states.unsharded_params(states.make_state_spec(MODEL, OPTIMIZER, horizon=10)) == []
    table = next(line for line in lines if line.startswith("embed."))
    assert f"{256 * 36 * 4:,} bytes" in table and "fsdp" in table


def batch_with_nan_loss(step: int):
    finite = batch(step)
    weights = finite.weights.copy()
    weights[0, 0] = np.nan
    return dataclasses.replace(finite, weights=weights)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_a_non_finite_step_changes_only_the_counters(backend):
    """Parameters and optimizer state are bitwise those of a run without that batch."""
    mesh = make_mesh(MeshConfig(data=8))
    skipping, reference = make_trainer(mesh, backend=backend), make_trainer(mesh, backend=backend)
    for k in (0, 1):
        skipping.step(batch(k))
        reference.step(batch(k))
    metrics = skipping.step(batch_with_nan_loss(2))
    assert not metrics["finite"] and metrics["skipped_steps"] == 1
    for k in (3, 4):
        last, expected = skipping.step(batch(k)), reference.step(batch(k))
        assert last["loss"] == expected["loss"] and last["learning_rate"] == expected["learning_rate"]
    one, other = skipping.global_state(), reference.global_state()
    assert fingerprint(one.params, one.opt_state) == fingerprint(other.params, other.opt_state)
    assert int(one.step) == 5 and int(other.step) == 4
    assert int(one.skipped) == 1 and int(other.skipped) == 0


def test_pmap_refuses_a_sharded_state():
    with pytest.raises(UserError, match=r"pmap.*fsdp.*jit"):
        make_trainer(make_mesh(MeshConfig(data=2, fsdp=4)), backend="pmap")


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match=r"parallel.backend='pjit': expected 'jit' or 'pmap'"):
        make_trainer(one_device(), backend="pjit")


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    message = r"train.global_batch=12 is not divisible by mesh.data x mesh.fsdp = 8: set it to 8"
    with axes.use_mesh(mesh), pytest.raises(UserError, match=message):
        backends.check_batch("train.global_batch", 12)


def test_the_digest_depends_on_order_tokens_and_samples():
    from llmjax.train.step import batch_digest

    original = batch(0)
    digests = {int(batch_digest(original, 0))}
    swapped = jax.tree.map(lambda x: x[::-1], original)
    other_token = dataclasses.replace(original, targets=original.targets + (np.arange(SEQ) == 5).astype(np.int32))
    other_sample = dataclasses.replace(original, sample=original.sample + np.uint32(1))
    for changed in (swapped, other_token, other_sample):
        digests.add(int(batch_digest(changed, 0)))
    assert len(digests) == 4
