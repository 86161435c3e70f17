"""Limits of the encoder's settings, published parameter counts, and the recipes that use them."""

import dataclasses

import pytest

from llmjax.binding import bind
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.encoder import EncoderConfig
from llmjax.run.config import resolve
from tests.models.test_decoder_config import CONFIGS, recipe


@pytest.mark.parametrize(
    ("family", "size", "vocab", "count"),
    [
        # Those of the models with a masked-LM head; BERT's paper says 110M and 340M, ModernBERT's 149M and 395M.
        ("bert", "base", 30522, 109_514_298),
        ("bert", "large", 30522, 335_174_458),
        ("modernbert", "base", 50368, 149_655_232),
        ("modernbert", "large", 50368, 395_881_664),
    ],
)
def test_published_parameter_counts(family, size, vocab, count):
    model = bind(EncoderConfig, recipe(family, size)["model"])
    assert registry.count_parameters(dataclasses.replace(model, vocab_size=vocab, vocab_multiple=1)) == count


def test_bert_with_its_pooler_and_without_its_head():
    """The count of the bare model: the pooler is the size of the head's linear map, the head has a norm and biases."""
    model = bind(EncoderConfig, recipe("bert", "base")["model"] | {"pooler": True})
    head = (768 * 768 + 768) + 2 * 768 + 30522
    count = registry.count_parameters(dataclasses.replace(model, vocab_size=30522, vocab_multiple=1))
    assert count - head == 109_482_240


@pytest.mark.parametrize("name", [f"{f}.py{s}" for f in ("bert", "modernbert") for s in ("", ":base", ":large")])
def test_recipes_train_on_masked_tokens(name):
    config = resolve(str(CONFIGS / name), [])
    assert config.objective.name == "masked" and not config.model.generates


def test_an_encoder_supports_only_masked_lm():
    with pytest.raises(UserError, match=r"objective.name='causal': model.family='encoder' supports objectives masked"):
        resolve(str(CONFIGS / "bert.py"), [("objective.name", "causal"), ("objective.rate", "None")])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "swish"}, "model.activation='swish'.*silu"),
        ({"norm_position": "middle"}, "model.norm_position='middle'.*post, pre"),
        ({"family": "decoder"}, "model.family='decoder'"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"token_types": -1}, "model.token_types=-1"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"rope_local_base": -1.0}, "model.rope_local_base=-1.0: must be at least 0"),
        ({"embed": 30, "num_heads": 4}, "model.num_heads=4: must divide model.embed=30"),
        ({"embed": 36, "num_heads": 4, "positions": "rotary"}, "model.head_dim=9: .*even"),
        ({"window": 8, "attention_pattern": "gx"}, "model.attention_pattern='gx': one letter a layer"),
    ],
)
def test_a_value_out_of_bounds_is_named(fields, words):
    with pytest.raises(UserError, match=words):
        EncoderConfig(**fields)


def test_the_run_must_fit_the_model():
    config = EncoderConfig(max_positions=64)
    config.check(seq_len=64, tensor=2)
    with pytest.raises(UserError, match=r"data.seq_len=65.*max_positions=64"):
        config.check(seq_len=65, tensor=1)
    with pytest.raises(UserError, match=r"mesh\.tensor=3: must divide model\.num_heads=4"):
        config.check(seq_len=64, tensor=3)
    dataclasses.replace(config, positions="rotary").check(seq_len=1 << 20, tensor=1)


def test_flops():
    bert = bind(EncoderConfig, recipe("bert", "base")["model"] | {"vocab_size": 30522})
    # 12 layers of 12 embed^2 weights and the head, 6 flops each; attention: 12 * layers * embed * seq_len
    weights = 12 * 12 * 768**2 + 768**2 + 768 * 30522
    assert bert.flops_per_token(512) == 6 * weights + 12 * 12 * 768 * 512
    modern = bind(EncoderConfig, recipe("modernbert", "base")["model"] | {"vocab_size": 50368})
    assert modern.local_layers == tuple(layer % 3 > 0 for layer in range(22))
    # 8 layers see the row, 14 their 64 neighbours on either side and themselves
    longer = modern.flops_per_token(2048) - modern.flops_per_token(1024)
    assert longer == 12 * 768 * 8 * 1024
    weights = 22 * 768 * (4 * 768 + 3 * 1152) + 768**2 + 768 * 50368
    assert modern.flops_per_token(1024) == 6 * weights + 12 * 768 * (8 * 1024 + 14 * 129)
