"""Decoders with mixtures of experts: router statistics, layouts, flops, limits."""

import dataclasses
import functools

from flax import nnx
import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.moe import MoeConfig
from llmjax.nn import losses
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel.mesh import MeshConfig, make_mesh
from tests.batches import packed
from tests.models.programs import assert_close, init_model
from tests.models.variants import DEEPSEEK, EXPERTS, MIXTRAL, VOCAB
from tests.train.trainer import ROWS, Trainer, one_device


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, batch):
    """(gradients, (logits, penalty, stats)) of what training lowers."""

    def loss(params):
        model = nnx.merge(graph, params)
        out = model(batch)
        sums = losses.cross_entropy(out.hidden, model.unembed, batch.targets, batch.weights, chunk=8, z_loss=0.0)
        return sums.nats + out.aux_loss, (model.unembed(out.hidden), out.aux_loss, out.aux_metrics)

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("name", EXPERTS)
def test_every_token_is_processed_and_padding_is_not_counted(name):
    config = EXPERTS[name]
    graph, params = init_model(config)
    batch = packed(4, 24, VOCAB)
    tokens = int((batch.segments > 0).sum())
    _, (_, _, stats) = run(graph, params, batch)
    layers = config.num_layers - config.dense_layers
    assert all(float(weight) == layers * tokens for _, weight in stats.values())
    means = {key: float(total / weight) for key, (total, weight) in stats.items()}
    assert means["load_balance_loss"] > 0.5 and means["router_z_loss"] > 0
    assert 1 / config.num_experts < means["max_expert_load"] <= 1 / config.experts_per_token
    assert 0 <= means["unused_expert_fraction"] < 1
    padded = dataclasses.replace(batch, inputs=np.where(batch.segments > 0, batch.inputs, 13))
    _, (_, penalty, padded_stats) = run(graph, params, padded)
    assert_close((penalty, padded_stats), run(graph, params, batch)[1][1:], 1e-7)


OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, ema_decay=0.9, expert_bias_update_rate=0.01
)
SEQ = 24
TRAINED = dataclasses.replace(DEEPSEEK, num_layers=2, balance_loss=0.1, router_z_loss=0.01, dropout=0.1)


def train_three_steps(mesh: Mesh, **settings):
    """(metrics of each step, parameters at the end)"""
    trainer = Trainer(TRAINED, OPTIMIZER, mesh, **settings)
    metrics = [trainer.step(packed(ROWS, SEQ, VOCAB, first_sample=k * ROWS)) for k in range(3)]
    return metrics, jax.device_get(trainer.global_state().params)


@pytest.fixture(scope="module")
def expected_run():
    return train_three_steps(one_device())


LAYOUTS = {
    "2 x 2 x 2, accumulated": (MeshConfig(data=2, fsdp=2, tensor=2), "jit", 2),
    "pmap 8, accumulated": (MeshConfig(data=8), "pmap", 2),
}


@pytest.mark.parametrize(
    "layout", [pytest.param("2 x 2 x 2, accumulated", marks=pytest.mark.exhaustive), "pmap 8, accumulated"]
)
def test_sharded_results_agree_with_one_device(layout, expected_run):
    """Losses, router losses and expert statistics of three steps, and the biases that balance, to the last bit."""
    mesh, backend, accumulation = LAYOUTS[layout]
    metrics, params = train_three_steps(make_mesh(mesh), backend=backend, accumulation=accumulation)
    for actual, expected in zip(metrics, expected_run[0], strict=True):
        for name in ("loss", "load_balance_loss", "router_z_loss", "max_expert_load", "unused_expert_fraction"):
            np.testing.assert_allclose(actual[name], expected[name], rtol=5e-6, err_msg=name)
        np.testing.assert_allclose(actual["grad_norm"], expected["grad_norm"], rtol=2e-5)
    expert_bias = lambda params: params["blocks"]["mlp"]["router"]["expert_bias"]
    np.testing.assert_array_equal(expert_bias(params), expert_bias(expected_run[1]))
    assert np.abs(expert_bias(params)).max() > 0.01
    for actual, expected in zip(jax.tree.leaves(params), jax.tree.leaves(expected_run[1]), strict=True):
        np.testing.assert_allclose(actual, expected, atol=5e-4)


def test_flops_count_the_active_experts():
    more = dataclasses.replace(DEEPSEEK, num_experts=16)
    router = 6 * DEEPSEEK.embed * 8 * 2
    assert more.flops_per_token(64) - DEEPSEEK.flops_per_token(64) == router
    wider = dataclasses.replace(DEEPSEEK, experts_per_token=3)
    assert wider.flops_per_token(64) - DEEPSEEK.flops_per_token(64) == 6 * 2 * 3 * 32 * 16
    # All matmul weights but the idle experts'; norms and biases multiply nothing, and the embedding is looked up.
    for config in (MIXTRAL, DEEPSEEK):
        shapes = registry.abstract(dataclasses.replace(config, vocab_multiple=1))[1]
        sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
        weights = sum(n for name, n in sizes.items() if "norm" not in name and "expert_bias" not in name)
        weights -= config.vocab_size * config.embed + config.inactive_params
        assert config.matmul_params == weights


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(experts_per_token=9), "experts_per_token=9: must be at most 8"),
        (dict(router_groups=3), "router_groups=3: must divide model.num_experts=8"),
        (dict(router_groups=4, router_top_groups=5), "router_top_groups=5: must be from 1 to"),
        (dict(router="tanh"), "router='tanh'"),
        (dict(dense_layers=4), "must be below model.num_layers=4"),
        (dict(gated=False), "experts are gated"),
        (dict(expert_activation="swiglu"), "expert_activation='swiglu': choose one of silu"),
        (dict(latent=8, biases="all"), "not supported with latent attention"),
        (dict(query_latent=8), "unused without model.latent"),
        (dict(balance_loss=-1.0), "must be at least 0"),
    ],
)
def test_limits(fields, words):
    with pytest.raises(UserError, match=words):
        MoeConfig(**fields)
