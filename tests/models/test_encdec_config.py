"""Limits of the encoder-decoder's settings, published parameter counts, what a token costs, and the recipes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.binding import bind
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.encdec import EncDecConfig
from tests.models.test_decoder_config import recipe


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("small", 76_961_152),
        ("base", 247_577_856),
        ("large", 783_150_080),
        ("xl", 2_849_757_184),
        ("xxl", 11_135_332_352),
    ],
)
def test_published_parameter_counts(size, count):
    """Of the checkpoints of T5 v1.1, whose 32,100 ids are padded to 32,128."""
    model = bind(EncDecConfig, recipe("t5", size)["model"])
    assert registry.count_parameters(dataclasses.replace(model, vocab_size=32128)) == count


def test_first_t5_has_its_published_parameter_count():
    base = EncDecConfig(
        vocab_size=32128, num_layers=12, embed=768, num_heads=12, activation="relu", gated=False, tie_embeddings=True
    )
    assert registry.count_parameters(base) == 222_903_552


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "swish"}, "model.activation='swish'.*silu"),
        ({"remat": "half"}, "model.remat='half'"),
        ({"dtype": "float64"}, "model.dtype='float64'"),
        ({"family": "decoder"}, "model.family='decoder'"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"num_decoder_layers": -1}, "model.num_decoder_layers=-1"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
        ({"relative_buckets": 2}, "model.relative_buckets=2: must be at least 4"),
        ({"relative_distance": 16}, "model.relative_distance=16: .*relative_buckets=32"),
        ({"vocab_size": 10, "start_id": 10}, "model.start_id=10: must be below model.vocab_size=10"),
        ({"embed": 30, "num_heads": 4}, "model.num_heads=4: must divide model.embed=30"),
    ],
)
def test_a_value_out_of_bounds_is_named(fields, words):
    with pytest.raises(UserError, match=words):
        EncDecConfig(**fields)


def test_the_mesh_must_fit_the_model():
    config = EncDecConfig(num_heads=4, mlp=48)
    config.check(seq_len=10_000, tensor=4)
    with pytest.raises(UserError, match=r"mesh.tensor=3: must divide model.num_heads=4"):
        config.check(seq_len=64, tensor=3)
    with pytest.raises(UserError, match=r"mesh.tensor=2: must divide model.mlp=33"):
        dataclasses.replace(config, mlp=33).check(seq_len=64, tensor=2)


def products(jaxpr) -> float:
    """Flops of all matmuls in a program."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            size, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * np.prod(out) * np.prod([size[i] for i in contracted])
            assert len(batch) <= 2
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("gated", [True, False])
def test_flops_are_those_of_the_traced_program(gated):
    config = EncDecConfig(
        vocab_size=64,
        vocab_multiple=64,
        num_layers=2,
        num_decoder_layers=3,
        embed=32,
        num_heads=4,
        head_dim=6,
        mlp=48,
        gated=gated,
        scan=False,
    )
    rows, source_len, target_len = 2, 40, 16
    shape, source = jnp.zeros((rows, target_len), jnp.int32), jnp.zeros((rows, source_len), jnp.int32)
    batch = Batch(
        inputs=shape,
        targets=shape,
        weights=jnp.ones(shape.shape),
        segments=shape,
        positions=shape,
        sample=jnp.zeros((rows, 2), jnp.uint32),
        source=source,
        source_segments=source,
        source_positions=source,
    )

    def forward(key):
        model = registry.build(config, key)
        return model.unembed(model(batch).hidden)

    # The backward pass has two products for each of the forward pass; attention computes the half that causality hides.
    traced = 3 * products(jax.make_jaxpr(forward)(jax.random.key(0)).jaxpr)
    hidden_half = 6 * 3 * 24 * target_len
    counted = config.flops_per_token(source_len, target_len) + hidden_half
    assert traced == rows * target_len * counted
    assert config.flops_per_token(40) == config.flops_per_token(40, 40)
