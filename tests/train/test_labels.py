"""A head for labels: packed documents score as each alone, meshes agree, and class weights weigh."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.moe import MoeConfig
from llmjax.models.recurrent import RecurrentConfig
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.train.step import make_loss
from tests.batches import packed
from tests.models.programs import init_model
from tests.train.trainer import ROWS, Trainer, one_device

SEQ, VOCAB, OUTPUTS = 32, 100, 3
SMALL = dict(vocab_size=VOCAB, num_layers=2, embed=32, num_outputs=OUTPUTS)
MODELS = {
    "encoder": EncoderConfig(**SMALL, num_heads=4, mlp=64, max_positions=SEQ, token_types=2),
    "pooler": EncoderConfig(**SMALL, num_heads=4, mlp=64, max_positions=SEQ, pooler=True),
    "decoder": DecoderConfig(**SMALL, num_heads=4, mlp=64),
    "tied": DecoderConfig(**SMALL, num_heads=4, mlp=64, tie_embeddings=True),
    "moe": MoeConfig(**SMALL, num_heads=4, mlp=64, num_experts=4, balance_loss=0.0, router_z_loss=0.0),
    "recurrent": RecurrentConfig(**SMALL, cell="gru"),
}


def labelled(first_sample: int, rows: int, config, kind: str = "class"):
    """Packed rows, scored at the first or the last position of each document."""
    batch = packed(rows, SEQ, VOCAB, first_sample=first_sample)
    rng = np.random.default_rng(first_sample)
    ends = np.diff(batch.segments, axis=1, append=0) != 0
    scored = (batch.positions == 0 if config.bidirectional else ends) & (batch.segments > 0)
    numbers = rng.normal(size=(*scored.shape, OUTPUTS)).astype(np.float32) * scored[..., None]
    labels = {"class": None, "classes": (numbers > 0).astype(np.float32), "numbers": numbers}[kind]
    targets = (rng.integers(0, OUTPUTS, scored.shape) * scored).astype(np.int32)
    return dataclasses.replace(
        batch,
        targets=targets if kind == "class" else np.zeros_like(targets),
        weights=scored.astype(np.float32),
        labels=labels,
        multi_label=kind == "classes",
    )


def alone(batch):
    """Each document of the rows in a row of its own, from position 0 on."""
    arrays = {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray) and name != "sample"}
    rows = []
    for row in range(len(batch.inputs)):
        for number in range(1, batch.segments[row].max() + 1):
            at = np.flatnonzero(batch.segments[row] == number)
            moved = {name: np.zeros_like(value[row]) for name, value in arrays.items()}
            for name, value in arrays.items():
                moved[name][: len(at)] = value[row, at]
            rows.append(moved | {"segments": (np.arange(SEQ) < len(at)).astype(np.int32)})
    stacked = {name: np.stack([row[name] for row in rows]) for name in arrays}
    return dataclasses.replace(batch, **stacked, sample=np.zeros((len(rows), 2), np.uint32))


def plain_loss(graph, params, batch, kind: str):
    """The summed loss of the scored positions, in plain jax.numpy, without chunks."""
    model = nnx.merge(graph, params)
    outputs = model.unembed(model(batch).hidden)
    if kind == "class":
        losses = -jnp.take_along_axis(jax.nn.log_softmax(outputs), batch.targets[..., None], -1)[..., 0]
    elif kind == "classes":
        p = jax.nn.sigmoid(outputs)
        losses = -jnp.mean(batch.labels * jnp.log(p) + (1 - batch.labels) * jnp.log(1 - p), axis=-1)
    else:
        losses = jnp.mean((outputs - batch.labels) ** 2, axis=-1)
    return jnp.sum(batch.weights * losses)


slowly = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pooler", "class"),
        ("recurrent", "class"),
        ("decoder", "classes"),
        slowly("encoder", "numbers"),
        *(slowly(name, "class") for name in ("encoder", "decoder", "tied", "moe")),
    ],
)
def test_packed_documents_score_as_each_alone(name, kind):
    config = MODELS[name]
    graph, params = init_model(config)
    batch = labelled(3, 2, config, kind)
    loss = make_loss(graph, seed=0, chunk=8, z_loss=0.0)
    (total, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    reference = jax.jit(jax.value_and_grad(lambda params: plain_loss(graph, params, alone(batch), kind)))
    expected, expected_grads = reference(params)
    assert sums.loss.weight == batch.segments.max(axis=1).sum()
    # float32 through two layers, added in another order
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), grads, expected_grads)


def test_class_weights_multiply_the_loss_and_its_weight():
    config = MODELS["decoder"]
    graph, params = init_model(config)
    batch, factors = labelled(3, 2, config), (0.5, 1.0, 4.0)
    compute = lambda batch, **fields: jax.jit(make_loss(graph, seed=0, chunk=8, z_loss=0.0, **fields))(params, batch)
    weighted = compute(batch, class_weights=factors)[1].loss
    by_hand = dataclasses.replace(batch, weights=batch.weights * np.array(factors, np.float32)[batch.targets])
    expected = compute(by_hand)[1].loss
    # The factors join a fused sum or come from the host: the last bit may differ.
    np.testing.assert_allclose(weighted.nats, expected.nats, rtol=1e-6)
    assert float(weighted.weight) == float(expected.weight)
    counts = np.bincount(batch.targets[batch.weights > 0], minlength=3)
    assert float(weighted.weight) == counts @ np.array(factors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoder", "classes"),
        pytest.param("pooler", "class", marks=pytest.mark.exhaustive),
        pytest.param("recurrent", "numbers", marks=pytest.mark.exhaustive),
    ],
)
def test_meshes_agree_with_one_device(name, kind):
    model = dataclasses.replace(MODELS[name], dropout=0.1)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    results = {}
    meshes = {"one": one_device(), "fsdp": make_mesh(MeshConfig(data=2, fsdp=4))}
    meshes["tensor"] = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for mesh_name, mesh in meshes.items():
        trainer = Trainer(model, optimizer, mesh, accumulation=2)
        results[mesh_name] = [trainer.step(labelled(step * ROWS, ROWS, model, kind)) for step in range(2)]
    for mesh_name in ("fsdp", "tensor"):
        for actual, expected in zip(results[mesh_name], results["one"], strict=True):
            assert actual["batch_digest"] == expected["batch_digest"]
            assert actual["num_targets"] == expected["num_targets"] and ("accuracy" in actual) == (kind != "numbers")
            # float32 sums of 16 rows in another order, compounded over two steps
            np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
            np.testing.assert_allclose(actual["grad_norm"], expected["grad_norm"], rtol=1e-4)


def test_another_label_gives_another_digest():
    config = MODELS["decoder"]
    trainer = Trainer(config, OptimizerConfig(), one_device())
    batch = labelled(0, ROWS, config, "numbers")
    assert batch.labels is not None
    changed = dataclasses.replace(batch, labels=batch.labels * 1.0001)
    assert trainer.step(batch)["batch_digest"] != trainer.step(changed)["batch_digest"]


@pytest.mark.parametrize("name", MODELS)
def test_the_head_takes_the_place_of_the_language_models(name):
    config = MODELS[name]
    _, shapes, axes = registry.abstract(config)
    assert "head" not in shapes or not shapes["head"]
    assert shapes["task_head"]["weight"].shape == (32, OUTPUTS) and axes["task_head"]["weight"] == ("embed", "outputs")
    assert not config.generates
    base = dataclasses.replace(config, num_outputs=0)
    assert "task_head" not in registry.abstract(base)[1] and base.flops_per_token(SEQ) > config.flops_per_token(SEQ)
