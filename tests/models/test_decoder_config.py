"""Limits of the decoder's settings, published parameter counts, and the recipes that use them."""

import dataclasses
import importlib.util
import pathlib

import pytest

from llmjax.config import UserError, bind
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.run_config import resolve

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def recipe(family: str, size: str) -> dict:
    spec = importlib.util.spec_from_file_location(family, CONFIGS / f"{family}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size).to_dict()


@pytest.mark.parametrize(
    ("family", "size", "vocab", "count"),
    [
        ("gpt2", "124M", 50257, 124_439_808),
        ("gpt2", "355M", 50257, 354_823_168),
        ("gpt2", "774M", 50257, 774_030_080),
        ("gpt2", "1.5B", 50257, 1_557_611_200),
        ("llama", "1B", 128256, 1_235_814_400),
        ("llama", "8B", 128256, 8_030_261_248),
        ("llama", "70B", 128256, 70_553_706_496),
        ("llama", "405B", 128256, 405_853_388_800),
    ],
)
def test_published_parameter_counts(family, size, vocab, count):
    model = bind(DecoderConfig, recipe(family, size)["model"])
    assert registry.count_parameters(dataclasses.replace(model, vocab_size=vocab, vocab_multiple=1)) == count


@pytest.mark.parametrize(
    "name", ["gpt2.py", "gpt2.py:1.5B", "llama.py", "llama.py:1B", "llama.py:8B", "llama.py:70B", "llama.py:405B"]
)
def test_recipes_bind_and_their_models_fit(name):
    config = resolve(str(CONFIGS / name), [])
    config.model.check(seq_len=config.data.seq_len, tensor=config.mesh.tensor)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_unknown_size_lists_the_sizes(family):
    with pytest.raises(UserError, match=r"no such size; choose one of .*B"):
        recipe(family, "9T")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "swish"}, "model.activation='swish'.*silu"),
        ({"norm": "rms"}, "did you mean 'rmsnorm'"),
        ({"attention": "flash"}, "model.attention='flash'.*dot"),
        ({"remat": "half"}, "model.remat='half'"),
        ({"dtype": "float64"}, "model.dtype='float64'"),
        ({"family": "encoder"}, "model.family='encoder'"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
        ({"num_heads": 4, "num_kv_heads": 3}, "model.num_kv_heads=3: must divide model.num_heads=4"),
        ({"embed": 30, "num_heads": 4}, "model.num_heads=4: must divide model.embed=30"),
        ({"embed": 36, "num_heads": 4}, "model.head_dim=9: .*even"),
    ],
)
def test_a_value_out_of_bounds_is_named(fields, words):
    with pytest.raises(UserError, match=words):
        DecoderConfig(**fields)


def test_the_run_must_fit_the_model():
    config = DecoderConfig(num_heads=4, num_kv_heads=2, positions="learned", max_positions=64)
    config.check(seq_len=64, tensor=2)
    with pytest.raises(UserError, match=r"data.seq_len=65.*max_positions=64"):
        config.check(seq_len=65, tensor=1)
    with pytest.raises(UserError, match=r"mesh.tensor=3: must divide model.num_heads=4"):
        config.check(seq_len=64, tensor=3)
    with pytest.raises(UserError, match=r"mesh.tensor=4: must divide model.num_kv_heads=2"):
        config.check(seq_len=64, tensor=4)


def test_derived_widths():
    assert DecoderConfig(embed=256, gated="plain").mlp_size == 1024
    assert DecoderConfig(embed=256).mlp_size == 768  # 8/3 * 256 = 682.7, rounded up to a multiple of 128
    assert DecoderConfig(vocab_size=50257).padded_vocab == 50304


def test_flops_of_gpt2():
    model = bind(DecoderConfig, recipe("gpt2", "124M")["model"] | {"vocab_size": 50257})
    # 12 layers of 12 embed^2 weights and the head, 6 flops each; attention: 6 * layers * embed * seq_len
    weights = 12 * 12 * 768**2 + 768 * 50257
    assert model.flops_per_token(1024) == 6 * weights + 6 * 12 * 768 * 1024
