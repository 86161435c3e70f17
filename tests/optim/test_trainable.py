"""Frozen parameters: how they are chosen, and that they have no gradient, no optimizer state and no update."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.lora import LoraConfig
from llmjax.optim.config import OptimizerConfig, finetuning_rate
from llmjax.optim.trainable import choose_trainable, merge, split
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import state as states
from tests.batches import packed
from tests.train.trainer import ROWS, Trainer, one_device

MODEL = DecoderConfig(vocab_size=200, num_layers=2, embed=32, num_heads=4, mlp=64)
ADAPTED = dataclasses.replace(MODEL, lora=LoraConfig(rank=2, layers=("blocks.attention.query", "*.up")))


def trained_names(model: DecoderConfig, **fields) -> set[str]:
    shapes = registry.abstract(model)[1]
    trained = split(shapes, choose_trainable(OptimizerConfig(**fields), shapes))[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(trained)}


def test_patterns_choose_the_trained_parameters():
    everything = trained_names(MODEL)
    assert trained_names(MODEL, frozen=("embed", "blocks.*")) == {"norm.scale", "head"}
    assert trained_names(MODEL, trainable=("*norm*",)) == {name for name in everything if "norm" in name}
    adapters = trained_names(ADAPTED)
    assert adapters == {f"blocks.{of}.adapter.{x}" for of in ("attention.query", "mlp.up") for x in "ab"}
    assert trained_names(ADAPTED, trainable=("head",)) == adapters | {"head"}
    assert trained_names(ADAPTED, frozen=("blocks.mlp",)) == {name for name in adapters if "query" in name}


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (
            MODEL,
            dict(frozen=("blocks.atention",)),
            r"optimizer.frozen: 'blocks.atention' matches no parameter \(did you",
        ),
        (MODEL, dict(trainable=("classifier",)), r"optimizer.trainable: 'classifier' matches no parameter"),
        (MODEL, dict(frozen=("*",)), r"optimizer.frozen=\('\*',\): no parameter is left"),
        (
            dataclasses.replace(ADAPTED, lora=dataclasses.replace(ADAPTED.lora, int8_base=True)),
            dict(trainable=("blocks.mlp.up",)),
            r"blocks.mlp.up.weight is stored in 8 bits",
        ),
    ],
)
def test_choices_that_cannot_be_are_refused(model, fields, message):
    with pytest.raises(UserError, match=message):
        trained_names(model, **fields)


def test_split_and_merge_are_inverse():
    params = {"a": {"b": 1, "c": 2}, "d": 3}
    trained, frozen = split(params, {"a": {"b": True, "c": False}, "d": False})
    assert (trained, frozen) == ({"a": {"b": 1, "c": None}, "d": None}, {"a": {"b": None, "c": 2}, "d": 3})
    assert merge(trained, frozen) == params


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd", "schedule_free_adamw"])
def test_the_state_of_every_optimizer_is_that_of_the_trained_parameters(name):
    with axes.use_mesh(one_device()):
        spec = states.make_state_spec(ADAPTED, OptimizerConfig(name=name), horizon=10)
    adapters = 2 * 2 * (32 + 32) + 2 * 2 * (32 + 64)
    assert spec.count_trained() == adapters
    # At most two moments for each trained parameter, and a few counters and statistics.
    assert sum(leaf.size for leaf in jax.tree.leaves(spec.shapes.opt_state)) <= 2 * adapters + 64


def test_a_step_holds_no_gradients_of_frozen_parameters():
    """Memory of the compiled step beside that of training everything: the difference is gradients and moments."""
    wide = dataclasses.replace(ADAPTED, embed=128, mlp=1024)
    sizes = {}
    for model in (wide, dataclasses.replace(wide, lora=LoraConfig())):
        trainer = Trainer(model, OptimizerConfig(learning_rate=1e-3), one_device())
        with axes.use_mesh(trainer.mesh):
            memory = trainer.compiled.step.lower(trainer.state, packed(ROWS, 8, 200)).compile().memory_analysis()
        sizes[model.lora.rank] = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    params = 4 * registry.count_parameters(dataclasses.replace(wide, lora=LoraConfig()))
    assert sizes[0][0] > 2.9 * params  # parameters and two moments
    assert sizes[2][0] < 1.1 * params
    assert sizes[0][1] - sizes[2][1] > 0.7 * params  # gradients


@pytest.fixture(scope="module")
def oracle():
    return run(one_device())


def run(mesh, **settings):
    """Losses and parameters of three steps with adapters, a trained head, an average and clipping."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip_norm=0.5, ema_decay=0.9, trainable=("head",))
    trainer = Trainer(ADAPTED, optimizer, mesh, **settings)
    start = jax.device_get(trainer.global_state().params)
    metrics = [trainer.step(packed(ROWS, 32, 200, first_sample=step * ROWS)) for step in range(3)]
    return metrics, start, jax.device_get(trainer.global_state().params)


def test_frozen_parameters_keep_their_bits(oracle):
    _, start, end = oracle
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), start, end)
    assert changed == choose_trainable(OptimizerConfig(trainable=("head",)), registry.abstract(ADAPTED)[1])


@pytest.mark.parametrize(
    ("mesh", "backend", "accumulation"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), "jit", 2),
        pytest.param(MeshConfig(data=1, fsdp=8), "jit", 1, marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=8), "pmap", 2, marks=pytest.mark.slow),
    ],
)
def test_meshes_agree(mesh, backend, accumulation, oracle):
    metrics, _, params = run(make_mesh(mesh), backend=backend, accumulation=accumulation)
    expected_metrics, _, expected = oracle
    for result, reference in zip(metrics, expected_metrics, strict=True):
        # As in tests/train/test_step.py: float32 sums in another order, and Adam's division by small moments.
        np.testing.assert_allclose(result["loss"], reference["loss"], rtol=2e-6)
        np.testing.assert_allclose(result["grad_norm"], reference["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, expected)


def test_the_default_rate_of_fine_tuning_is_lower():
    assert finetuning_rate("adamw", adapters=False) == (2e-5, 1e-3)
    assert finetuning_rate("adamw", adapters=True) == (2e-4, 1e-3)
