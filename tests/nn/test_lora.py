"""Adapters of linear layers: the function that they compute, its gradients, and what the config may select."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.nn.linear import Linear
from llmjax.nn.lora import LoraConfig, add_adapters, linear_layers
from tests.batches import packed_for
from tests.models.programs import assert_close, logits
from tests.models.variants import FAMILIES, SEQ, VOCAB

PLAIN, DORA = LoraConfig(rank=3, alpha=6.0), LoraConfig(rank=3, alpha=6.0, dora=True)


class OneLayer(nnx.Module):
    """One linear layer of two input and two output dimensions."""

    def __init__(self, config: LoraConfig):
        inputs, outputs = {"heads": 2, "head_dim": 4}, {"embed": 5, "mlp": 3}
        self.map = Linear(jax.random.key(0), inputs, outputs, bias=True, dtype="float32")
        add_adapters(self, config, jax.random.key(1))


def with_noise(params):
    """Noise on every leaf that is not of a weight stored in 8 bits, so that b and the biases are not 0.

    The scales of such weights are far below the noise, which would make the model amplify each rounding.
    """
    rng = np.random.default_rng(0)

    def add(path, leaf):
        is_8_bits = leaf.dtype == jnp.int8 or path[-1].key == "weight_scale"
        return leaf if is_8_bits else leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(add, params)


def reference(params: dict, x: np.ndarray, config: LoraConfig) -> jax.Array:
    """The formulas of both papers on flat matrices; the norm of DoRA is a constant."""
    adapter = params["adapter"]
    weight = params["weight"].reshape(8, 15)
    if config.int8_base:
        weight = weight.astype(jnp.float32) * params["weight_scale"].reshape(15)
    total = weight + config.alpha / config.rank * adapter["a"].reshape(8, -1) @ adapter["b"].reshape(-1, 15)
    if config.dora:
        norm = jax.lax.stop_gradient(jnp.linalg.norm(total, axis=0))
        total = total * adapter["magnitude"].reshape(15) / norm
    return (x.reshape(-1, 8) @ total + params["bias"].reshape(15)).reshape(-1, 5, 3)


@pytest.mark.parametrize(
    "config", [PLAIN, DORA, dataclasses.replace(DORA, int8_base=True)], ids=["lora", "dora", "int8"]
)
def test_outputs_and_gradients_are_those_of_the_formulas(config):
    graph, state = nnx.split(OneLayer(config))
    params = with_noise(nnx.to_pure_dict(state))["map"]
    x = np.random.default_rng(1).normal(size=(7, 2, 4)).astype(np.float32)

    def run(function, adapter, x):
        return jax.value_and_grad(
            lambda adapter, x: jnp.sum(jnp.sin(function({**params, "adapter": adapter}, x))), argnums=(0, 1)
        )(adapter, x)

    actual = run(lambda params, x: nnx.merge(graph, {"map": params}).map(x), params["adapter"], x)
    expected = run(lambda params, x: reference(params, x, config), params["adapter"], x)
    # Sums of 7 x 15 float32 terms in another order.
    assert_close(actual, expected, 2e-6)
    merged = nnx.merge(graph, {"map": params}).map.merged_weight(jnp.float32).reshape(8, 15)
    direct = reference({**params, "bias": jnp.zeros((5, 3))}, np.eye(8, dtype=np.float32), config).reshape(8, 15)
    np.testing.assert_allclose(merged, direct, atol=1e-6)


def test_eight_bits_are_within_half_a_scale():
    plain = nnx.to_pure_dict(nnx.state(OneLayer(PLAIN)))["map"]["weight"]
    stored = nnx.to_pure_dict(nnx.state(OneLayer(dataclasses.replace(PLAIN, int8_base=True))))["map"]
    assert stored["weight"].dtype == jnp.int8 and stored["weight_scale"].shape == (5, 3)
    error = np.abs(np.asarray(stored["weight"] * stored["weight_scale"] - plain))
    assert (error <= 0.5001 * np.asarray(stored["weight_scale"])).all() and error.max() > 0


# Families whose linear layers are read in different ways: stacked, concatenated gates, latents absorbed when decoding.
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", PLAIN),
        ("lstm", DORA),
        pytest.param("deepseek", PLAIN, marks=pytest.mark.slow),
        pytest.param("t5", DORA, marks=pytest.mark.slow),
        pytest.param("bert", dataclasses.replace(PLAIN, int8_base=True), marks=pytest.mark.slow),
    ],
)
def test_adapters_start_as_the_model_and_can_be_merged(name, config):
    plain = FAMILIES[name]
    adapted = dataclasses.replace(plain, lora=config)
    base = jax.jit(lambda key: registry.init(plain, key))(jax.random.key(0))
    params = jax.jit(lambda base, key: registry.add_adapters(adapted, base, key))(base, jax.random.key(0))
    (graph, shapes, _), plain_graph = registry.abstract(adapted), registry.abstract(plain)[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    batch = packed_for(plain, 2, SEQ, VOCAB)
    scored = batch.segments > 0
    if not config.int8_base:
        start, expected = logits(graph, params, batch), logits(plain_graph, base, batch)
        # b is zero; a magnitude over its own norm is 1 up to a rounding.
        np.testing.assert_allclose(start[scored], expected[scored], atol=1e-5)
    params = with_noise(params)
    merged = jax.jit(lambda params: registry.merge_adapters(adapted, params))(params)
    actual, expected = logits(graph, params, batch), logits(plain_graph, merged, batch)
    largest = np.abs(np.asarray(expected)[scored][:, :VOCAB]).max()
    np.testing.assert_allclose(actual[scored], expected[scored], atol=1e-5 * largest)


def test_fresh_adapters_do_not_depend_on_what_else_is_adapted():
    some = dataclasses.replace(FAMILIES["llama"], lora=dataclasses.replace(PLAIN, layers=("blocks.attention.query",)))
    both = dataclasses.replace(some, lora=PLAIN)
    of = lambda config: registry.init(config, jax.random.key(0))["blocks"]["attention"]["query"]
    jax.tree.map(np.testing.assert_array_equal, of(some), of(both))


def test_patterns_select_layers():
    config = dataclasses.replace(PLAIN, layers=("*.up", "blocks.attention"))
    shapes = registry.abstract(dataclasses.replace(FAMILIES["llama"], lora=config))[1]["blocks"]
    adapted = {
        f"{part}.{name}" for part in ("attention", "mlp") for name in shapes[part] if "adapter" in shapes[part][name]
    }
    assert adapted == {"mlp.up", *(f"attention.{name}" for name in ("query", "key", "value", "out"))}


@pytest.mark.parametrize(
    ("family", "pattern", "message"),
    [
        (
            "llama",
            "blocks.atention",
            r"'blocks.atention' matches no linear layer \(did you mean 'blocks.attention'\?\)",
        ),
        ("llama", "embed", r"'embed' selects embed.table, which is not of a linear layer"),
        ("mixtral", "blocks.mlp", r"'blocks.mlp' selects blocks.mlp.*, which is not of a linear layer"),
    ],
)
def test_patterns_that_select_no_linear_layer_are_refused(family, pattern, message):
    config = dataclasses.replace(FAMILIES[family], lora=dataclasses.replace(PLAIN, layers=(pattern,)))
    with pytest.raises(UserError, match=message):
        registry.abstract(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=-1), "model.lora.rank=-1"),
        (dict(rank=2, alpha=0.0), "model.lora.alpha=0"),
        (dict(rank=2, layers=()), r"model.lora.layers=\(\)"),
        (dict(dora=True), "model.lora.dora=true: there are no adapters"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**fields)


def test_every_family_has_linear_layers():
    for name, config in FAMILIES.items():
        assert linear_layers(nnx.merge(*registry.abstract(config)[:2])), name
