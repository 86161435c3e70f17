"""Limits of the decoder's settings, published parameter counts, and the recipes that use them."""

import dataclasses
import pathlib

import pytest

from llmjax.binding import bind, load_module
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn import kernels

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def recipe(family: str, size: str) -> dict:
    return load_module(CONFIGS / f"{family}.py").get_config(size).to_dict()


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
        ("mistral", "7B", 32000, 7_241_732_096),
        ("mistral", "12B", 131072, 12_247_782_400),
        ("qwen3", "0.6B", 151936, 596_049_920),
        ("qwen3", "1.7B", 151936, 1_720_574_976),
        ("qwen3", "4B", 151936, 4_022_468_096),
        ("qwen3", "8B", 151936, 8_190_735_360),
        ("qwen3", "14B", 151936, 14_768_307_200),
        ("qwen3", "32B", 151936, 32_762_123_264),
        ("gemma", "2-2B", 256000, 2_614_341_888),
        ("gemma", "2-9B", 256000, 9_241_705_984),
        ("gemma", "2-27B", 256000, 27_227_128_320),
        # Gemma 3 from 4B on is published with 416,866,032 parameters of the image encoder and its projection; not here.
        ("gemma", "3-270M", 262144, 268_098_176),
        ("gemma", "3-1B", 262144, 999_885_952),
        ("gemma", "3-4B", 262208, 4_300_079_472 - 416_866_032 - 1152 * 2561),
        ("gemma", "3-12B", 262208, 12_187_325_040 - 416_866_032 - 1152 * 3841),
        ("gemma", "3-27B", 262208, 27_432_406_640 - 416_866_032 - 1152 * 5377),
        ("olmo", "2-1B", 100352, 1_484_916_736),
        ("olmo", "2-7B", 100352, 7_298_617_344),
        ("olmo", "2-13B", 100352, 13_716_198_400),
        ("olmo", "2-32B", 100352, 32_234_279_936),
        ("olmo", "3-7B", 100278, 7_298_011_136),
        ("olmo", "3-32B", 100278, 32_233_522_176),
    ],
)
def test_published_parameter_counts(family, size, vocab, count):
    model = bind(DecoderConfig, recipe(family, size)["model"])
    assert registry.count_parameters(dataclasses.replace(model, vocab_size=vocab, vocab_multiple=1)) == count


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
        ({"num_layers": 10**9}, "model.num_layers=1000000000: must be at most 4096"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
        ({"num_heads": 4, "num_kv_heads": 3}, "model.num_kv_heads=3: must divide model.num_heads=4"),
        ({"embed": 30, "num_heads": 4}, "model.num_heads=4: must divide model.embed=30"),
        ({"embed": 36, "num_heads": 4}, "model.head_dim=9: .*even"),
        ({"window": -1}, "model.window=-1: must be at least 0"),
        ({"attention_pattern": "lx"}, "model.attention_pattern='lx': one letter a layer"),
        ({"attention_pattern": ""}, "model.attention_pattern='': one letter a layer"),
        ({"qk_norm": "heads"}, "did you mean 'head'"),
        ({"norm_position": "inside"}, "model.norm_position='inside'.*inner"),
        ({"score_softcap": -1.0}, "model.score_softcap=-1.0"),
        ({"embed_multiplier": 0.0}, "model.embed_multiplier=0.0: must be above 0"),
        ({"rope_local_base": 1e4}, "model.rope_local_base=10000.0: no layer is local"),
        ({"rope_local_base": 1e4, "window": 8, "attention_pattern": "g"}, "no layer is local"),
        ({"rope_factor": 2.0}, "model.rope_factor=2.0: name a model.rope_scaling"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0}, "model.rope_original=0: .*'yarn' needs it"),
        ({"rope_scaling": "linear", "rope_factor": 2.0, "rope_original": 8}, "'linear'.*no use for rope_original"),
        ({"rope_scaling": "llama3", "rope_original": 8, "rope_low": 5.0}, "model.rope_low=5.0.*rope_high=4.0"),
        ({"rope_scaling": "llama3", "rope_original": 8, "rope_attention_factor": 2.0}, "only .*'yarn' has them"),
        ({"rope_truncate": False}, "only .*'yarn' has them"),
        ({"positions": "learned", "rope_scaling": "linear"}, "model.rope_scaling='linear': .*learned"),
    ],
)
def test_a_value_out_of_bounds_is_named(fields, words):
    with pytest.raises(UserError, match=words):
        DecoderConfig(**fields)


@pytest.mark.parametrize(
    ("feature", "fields"),
    [
        ("scale", {"score_scale": 0.1}),
        ("softcap", {"score_softcap": 50.0}),
        ("sinks", {"attention_sinks": True}),
        ("window", {"window": 8}),
        ("pattern", {"window": 8, "attention_pattern": "lg"}),
    ],
)
def test_kernel_refuses_unsupported_features(feature, fields, monkeypatch):
    full = kernels.KERNELS["dot"]
    less = dataclasses.replace(full, supports=full.supports - {feature})
    monkeypatch.setitem(kernels.KERNELS, "dot", less)
    DecoderConfig(attention="dot")
    with pytest.raises(UserError, match=r"model\.attention='dot': dot does not support .*model\.\w+=.*'auto'"):
        DecoderConfig(attention="dot", **fields)


def test_patterns_repeat_over_the_layers():
    of = lambda **fields: "".join("l" if local else "g" for local in DecoderConfig(**fields).local_layers)
    assert of(num_layers=3) == "ggg"
    assert of(num_layers=3, window=8) == "lll"
    assert of(num_layers=8, window=8, attention_pattern="llg") == "llgllgll"


def test_flops_count_the_keys_inside_a_window():
    """With a window of 8, the first 8 of 32 queries attend to 1 to 8 keys and the others to 8; half is counted."""
    base = DecoderConfig(vocab_size=64, num_layers=2)
    attention_flops = lambda **fields: dataclasses.replace(base, **fields).flops_per_token(32) - 6 * base.matmul_params
    each = 12 * base.num_heads * base.head_size
    assert attention_flops() == each * 2 * 16
    assert attention_flops(window=8) == each * 2 * (8 * 8 / 2 + 24 * 8) / 32
    assert attention_flops(window=8, attention_pattern="lg") == each * ((8 * 8 / 2 + 24 * 8) / 32 + 16)
    assert attention_flops(window=64) == attention_flops()


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
    assert DecoderConfig(embed=256, gated=False).mlp_size == 1024
    assert DecoderConfig(embed=256).mlp_size == 768  # 8/3 * 256 = 682.7, rounded up to a multiple of 128
    assert DecoderConfig(vocab_size=50257).padded_vocab == 50304


def test_flops_of_gpt2():
    model = bind(DecoderConfig, recipe("gpt2", "124M")["model"] | {"vocab_size": 50257})
    # 12 layers of 12 embed^2 weights and the head, 6 flops each; attention: 6 * layers * embed * seq_len
    weights = 12 * 12 * 768**2 + 768 * 50257
    assert model.flops_per_token(1024) == 6 * weights + 6 * 12 * 768 * 1024
