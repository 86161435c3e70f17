"""Quantized tensors against values computed from their bits, in memory and on disk in several shards."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from llmjax.binding import bind
from llmjax.errors import UserError
from llmjax.interop import files, hf_checkpoint, mapping
from llmjax.interop.hf_checkpoint import Fp8Blocks, Mxfp4
from llmjax.interop.moe import ARCHITECTURES
from llmjax.models import registry
from llmjax.models.moe import MoeConfig
from tests.interop import state_dicts

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
GPT_OSS = MoeConfig(
    vocab_size=40,
    vocab_multiple=8,
    num_layers=2,
    embed=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp=32,
    expert_mlp=32,
    num_experts=3,
    attention_sinks=True,
    biases="all",
    window=4,
    attention_pattern="lg",
    expert_activation="clamped_swiglu",
    max_positions=64,
)
DEEPSEEK = MoeConfig(
    vocab_size=40,
    vocab_multiple=8,
    num_layers=3,
    dense_layers=1,
    embed=24,
    num_heads=2,
    head_dim=8,
    mlp=40,
    expert_mlp=16,
    num_experts=4,
    shared_experts=1,
    router="sigmoid",
    expert_bias=True,
    latent=12,
    query_latent=20,
    rope_dim=4,
    value_dim=8,
    max_positions=64,
)


def fp4(code: int) -> float:
    """A sign, two bits of exponent with a bias of 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
    return -value if sign else value


def packed_experts(rng, experts, outputs, inputs) -> tuple[dict, np.ndarray]:
    """(blocks and scales, the tensor [experts, inputs, outputs] that they mean)"""
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    scales = rng.integers(120, 130, (experts, outputs, inputs // 32)).astype(np.uint8)
    meant = np.zeros((experts, inputs, outputs), np.float32)
    for e, o, g, b in np.ndindex(*blocks.shape):
        byte, power = int(blocks[e, o, g, b]), 2.0 ** (int(scales[e, o, g]) - 127)
        meant[e, 32 * g + 2 * b, o], meant[e, 32 * g + 2 * b + 1, o] = fp4(byte & 15) * power, fp4(byte >> 4) * power
    return {"_blocks": blocks, "_scales": scales}, meant


def packed_matrix(rng, shape, block) -> tuple[dict, np.ndarray]:
    """(weight and factors, the matrix that they mean)"""
    weight = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    tiles = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    factors = rng.uniform(0.5, 2, tiles).astype(np.float32)
    meant = np.zeros(shape, np.float32)
    for i, j in np.ndindex(*shape):
        meant[i, j] = np.float32(weight[i, j]) * factors[i // block[0], j // block[1]]
    return {"": weight, "_scale_inv": factors}, meant


def write(to, tensors: dict, config: dict) -> None:
    """A folder of several shards."""
    to.mkdir()
    (to / "config.json").write_text(json.dumps(config))
    types = {np.dtype(value): key for key, value in files.TYPES.items()}
    specs = {name: (types[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    files.write_folder(to, specs, lambda name: tensors[name], limit=20_000)
    assert len(list(to.glob("*.safetensors"))) > 1


def state_of(config: MoeConfig, architecture) -> dict[str, np.ndarray]:
    """Random tensors of a model, as they lie on disk unpacked."""
    rng = np.random.default_rng(0)
    shapes = registry.abstract(config)[1]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return state_dicts.dump(architecture.rules(config), params, config)


def read(to) -> tuple[MoeConfig, dict]:
    """What `llmjax import` reads."""
    checkpoint = hf_checkpoint.read(to)
    config = bind(MoeConfig, checkpoint.architecture.read_config(checkpoint.hf), "model")
    table = mapping.ParamMapping(checkpoint.architecture.rules(config), config)
    table.check_tensors(checkpoint.tensors)
    everything = {name: tuple(slice(0, size) for size in leaf.shape) for name, leaf in table.shapes.items()}
    return config, {name: table.read(name, index, checkpoint.tensors) for name, index in everything.items()}


def expected_of(config: MoeConfig, architecture, state) -> dict[str, np.ndarray]:
    return mapping.flatten(state_dicts.load(architecture.rules(config), state, config))


def test_mxfp4_on_disk(tmp_path):
    architecture, rng = ARCHITECTURES["GptOssForCausalLM"], np.random.default_rng(1)
    meant, disk = state_of(GPT_OSS, architecture), {}
    for name, tensor in list(meant.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            packed, meant[name] = packed_experts(rng, tensor.shape[0], tensor.shape[2], tensor.shape[1])
            disk |= {name + suffix: part for suffix, part in packed.items()}
        else:
            disk[name] = tensor
    hf = architecture.write_config(GPT_OSS) | {"architectures": ["GptOssForCausalLM"]}
    hf["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    write(tmp_path / "in", disk, hf)
    config, params = read(tmp_path / "in")
    for name, tensor in expected_of(config, architecture, meant).items():
        np.testing.assert_array_equal(params[name], tensor, err_msg=name)


def test_fp8_files_and_the_ignored_layer(tmp_path):
    architecture, rng = ARCHITECTURES["DeepseekV3ForCausalLM"], np.random.default_rng(1)
    meant, disk = state_of(DEEPSEEK, architecture), {}
    for name, tensor in list(meant.items()):
        if "proj" in name:
            packed, meant[name] = packed_matrix(rng, tensor.shape, (16, 16))
            disk |= {name + suffix: part for suffix, part in packed.items()}
        else:
            disk[name] = tensor
    disk["model.layers.61.enorm.weight"] = np.ones(24, np.float32)
    hf = architecture.write_config(DEEPSEEK) | {"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": FP8}
    write(tmp_path / "in", disk, hf | {"num_nextn_predict_layers": 1})
    config, params = read(tmp_path / "in")
    for name, tensor in expected_of(config, architecture, meant).items():
        np.testing.assert_array_equal(params[name], tensor, err_msg=name)


UNPACKED = {
    "F8_E4M3": (FP8, ml_dtypes.float8_e4m3fn, "F8_E4M3 without w_scale_inv; supported are F32, BF16, F16"),
    "F8_E5M2": (FP8, ml_dtypes.float8_e5m2, "F8_E5M2 without w_scale_inv"),
    "I8": (FP8, np.int8, "I8 without w_scale_inv"),
    "U8": ({"quant_method": "mxfp4"}, np.uint8, "U8 without w_blocks and w_scales"),
    "F64": ({"quant_method": "mxfp4"}, np.float64, "F64 without w_blocks and w_scales"),
}


@pytest.mark.parametrize("dtype", UNPACKED)
def test_unquantized_tensors_have_a_supported_type(tmp_path, dtype):
    settings, kind, message = UNPACKED[dtype]
    tensors = {"w": np.ones((16, 16), kind), "x": np.ones((128, 128), np.float32)}
    write(tmp_path / "in", tensors, {"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": settings})
    with pytest.raises(UserError, match=f"tensor w is stored as {message}"):
        hf_checkpoint.read(tmp_path / "in")


def test_error_names_what_does_not_fit():
    with pytest.raises(UserError, match="x_scales is missing"):
        Mxfp4({}).shapes({"x_blocks": (2, 4, 1, 16)})
    with pytest.raises(UserError, match="weight_block_size=None"):
        Fp8Blocks({"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"w_scale_inv has shape \[1, 1\]; its weight needs \[2, 1\]"):
        Fp8Blocks(FP8).shapes({"w": (20, 16), "w_scale_inv": (1, 1)})
    assert Mxfp4({}).shapes({"a_scales": (3,)}) == {"a_scales": (3,)}  # a name, and nothing packed
