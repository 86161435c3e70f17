"""GGUF architectures: metadata from and to config.json, and the form in which llama.cpp's converter stores tensors."""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.interop.hf_config import FULL, SLIDING
from llmjax.interop.mapping import Tensor
from llmjax.nn import rotary

Metadata = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
ROPE_FACTORS = "rope_freqs.weight"  # by which the rotary frequencies of Llama 3.1 are divided; written for each model

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_LLAMA = _SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_GEMMA = _LLAMA | {"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"}
_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_T5 = {
    "context_length": "n_positions",
    "embedding_length": "d_model",
    "block_count": "num_layers",
    "decoder_block_count": "num_decoder_layers",
    "feed_forward_length": "d_ff",
    "attention.head_count": "num_heads",
    "attention.key_length": "d_kv",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.relative_buckets_count": "relative_attention_num_buckets",
    "decoder_start_token_id": "decoder_start_token_id",
}
_BERT = _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"}
# Metadata that change nothing, or that other fields and the tensors imply.
_IMPLIED = {"vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.finetuned", "pooling_type"}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor is stored.

    store       tensor as transformers has it -> as it is stored
    restore     the inverse
    transposed  whether that exchanges its two dimensions; else its shape remains
    """

    store: Callable[[np.ndarray], np.ndarray] = lambda array: array
    restore: Callable[[np.ndarray], np.ndarray] = lambda array: array
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class GgufArchitecture:
    """A value of general.architecture.

    fields     key of the metadata, without the architecture -> field of config.json, for those that correspond
    classes    the Hugging Face classes that are stored in it
    complete   (config.json so far, metadata, shapes) -> the other fields of config.json, with "architectures" and
               "model_type"; it removes the keys that it reads from the metadata
    extend     config.json -> the other metadata
    form       (name, config.json) -> the form in which a tensor is stored
    left_out   prefixes of tensors, in the rules' names, that it does not have and llama.cpp does not need
    """

    fields: Mapping[str, str]
    classes: tuple[str, ...]
    complete: Callable[[dict[str, Any], dict[str, Any], Shapes], dict[str, Any]]
    extend: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: {}
    form: Callable[[str, dict[str, Any]], Form] = lambda name, hf: Form()
    left_out: tuple[str, ...] = ()


def read_config(name: str, metadata: Metadata, shapes: Shapes, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """The config.json that the metadata of architecture `name` stand for.

    shapes        of the stored tensors by name
    rope_factors  the tensor ROPE_FACTORS, if there is one
    Unknown metadata become fields of their own name, which the reader of config.json refuses. Raises UserError where
    the metadata contradict each other.
    """
    architecture = ARCHITECTURES[name]
    unread = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    implied = {key: unread.pop(key) for key in _IMPLIED if key in unread}
    hf = {field: unread.pop(key) for key, field in architecture.fields.items() if key in unread}
    if "token_embd.weight" not in shapes:
        raise UserError("tensor token_embd.weight is missing")
    hf["vocab_size"] = shapes["token_embd.weight"][0]
    hf |= architecture.complete(hf, unread, shapes)
    hf |= _read_rope(hf, unread, rope_factors)
    for key in ("rope.dimension_count", "attention.value_length"):
        if "head_dim" in hf and implied.get(key, hf["head_dim"]) != hf["head_dim"]:
            raise UserError(f"{name}.{key}={implied[key]} is not supported with heads of {hf['head_dim']} dimensions")
    return {**hf, **{f"{name}.{key}": value for key, value in unread.items()}}


def write_config(name: str, hf: dict[str, Any]) -> dict[str, Any]:
    """The metadata of architecture `name` for a config.json, whose vocabulary has hf["vocab_size"] ids."""
    architecture = ARCHITECTURES[name]
    values = {key: hf[field] for key, field in architecture.fields.items() if hf.get(field) is not None}
    values |= architecture.extend(hf) | _write_rope(hf) | {"vocab_size": hf["vocab_size"]}
    if "head_dim" in hf:
        values |= {"attention.value_length": hf["head_dim"], "rope.dimension_count": hf["head_dim"]}
    return {f"{name}.{key}": value for key, value in values.items()}


def find_architecture(hf_class: str) -> str | None:
    """The architecture in which a Hugging Face class is stored; None if there is none."""
    return next((name for name, architecture in ARCHITECTURES.items() if hf_class in architecture.classes), None)


def name_tensor(name_map: Any, tensor: Tensor, publish: Callable[[str], str]) -> tuple[str, int | None] | None:
    """(name in GGUF, expert or None) of a Hugging Face tensor; None if the architecture has no such tensor.

    name_map   gguf.TensorNameMap of the architecture
    publish    of the class that llama.cpp's converter reads
    """
    hf_name, expert = publish(tensor.hf_names[0]), None
    if match := re.search(r"\.experts\.(\d+)\.", hf_name):
        hf_name, expert = hf_name.replace(match[0], ".experts."), int(match[1])
    stem, _, suffix = hf_name.rpartition(".")
    name = name_map.get_name(stem)
    return None if name is None else (f"{name}.{suffix}", expert)


def find_rope_factors(hf: dict[str, Any]) -> np.ndarray | None:
    """The tensor ROPE_FACTORS of a config.json, float32 [head_dim / 2]; None if its frequencies need none."""
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaling = rotary.Scaling(
        kind="llama3",
        factor=rope["factor"],
        original=rope["original_max_position_embeddings"],
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
    )
    plain, lowered = (rotary.frequencies(hf["head_dim"], hf["rope_theta"], kind) for kind in (None, scaling))
    return (plain / lowered).astype(np.float32)


def _read_rope(hf: dict[str, Any], unread: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
    """The field rope_scaling. Metadata have linear and YaRN scaling; that of Llama 3.1 has only its factors."""
    kind = unread.pop("rope.scaling.type", "none")
    if factors is not None:
        return {"rope_scaling": _recognize_llama3(hf, factors)}
    if kind not in ("linear", "yarn"):
        if kind != "none":
            raise UserError(f"rope.scaling.type={kind!r} is not supported, only none, linear and yarn")
        return {}
    rope = {"rope_type": kind}
    keys = {"factor": "factor"}
    if kind == "yarn":
        keys |= {"original_context_length": "original_max_position_embeddings"}
        keys |= {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    return {
        "rope_scaling": rope
        | {field: unread.pop(f"rope.scaling.{key}") for key, field in keys.items() if f"rope.scaling.{key}" in unread}
    }


def _recognize_llama3(hf: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The scaling that gives these factors, of those of the published models; all of them have the same bounds."""
    rope = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    expected = find_rope_factors(hf | {"rope_parameters": rope})
    if expected is None or expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise UserError(f"tensor {ROPE_FACTORS}: not the factors of Llama 3.1, and others are not supported")
    return rope


def _write_rope(hf: dict[str, Any]) -> dict[str, Any]:
    rope = hf.get("rope_parameters") or {}
    rope = rope.get(FULL, rope)
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    values = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        values |= {"rope.scaling.yarn_beta_fast": rope["beta_fast"], "rope.scaling.yarn_beta_slow": rope["beta_slow"]}
    return values


def _complete_llama(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Llama, Mistral and Mixtral, which llama.cpp does not tell apart."""
    hf |= {field: unread.pop(key) for key, field in _EXPERTS.items() if key in unread}
    shared = _complete_shared(hf, shapes) | {"hidden_act": "silu"}
    if hf.get("num_local_experts"):
        return shared | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    for field in _EXPERTS.values():
        hf.pop(field, None)
    biases = {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
    return shared | biases | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _extend_llama(hf: dict[str, Any]) -> dict[str, Any]:
    return {key: hf[field] for key, field in _EXPERTS.items() if field in hf}


def _complete_shared(hf: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Fields that llama.cpp derives where the metadata lack them, and the tied head, which is stored once."""
    heads, embed = hf.get("num_attention_heads"), hf.get("hidden_size")
    derived = {} if "head_dim" in hf or not heads or not embed else {"head_dim": embed // heads}
    derived |= {} if "num_key_value_heads" in hf else {"num_key_value_heads": heads}
    derived |= {} if "rope_theta" in hf else {"rope_theta": 10_000.0}
    return derived | {"tie_word_embeddings": "output.weight" not in shapes}


def _complete_qwen3(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    del unread
    return _complete_shared(hf, shapes) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def _complete_qwen3_moe(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    keys = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
    keys |= {"expert_feed_forward_length": "moe_intermediate_size"}
    hf |= {field: unread.pop(key) for key, field in keys.items() if key in unread}
    # llama.cpp always divides the weights of the chosen experts by their sum.
    shared = _complete_shared(hf, shapes) | {"norm_topk_prob": True}
    return shared | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def _extend_qwen3_moe(hf: dict[str, Any]) -> dict[str, Any]:
    keys = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
    return {key: hf[field] for key, field in (keys | {"expert_feed_forward_length": "moe_intermediate_size"}).items()}


def _complete_gemma2(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    shared = _complete_gemma(hf, shapes, layers_of_27b=46, period=2)
    softcap = {"attn_logit_softcapping": unread.pop("attn_logit_softcapping", 50.0)}
    return shared | softcap | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}


def _complete_gemma3(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    shared = _complete_gemma(hf, shapes, layers_of_27b=62, period=6)
    local_base = {"rope_local_base_freq": unread.pop("rope.freq_base_swa", 10_000.0)}
    return shared | local_base | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def _complete_gemma(hf: dict[str, Any], shapes: Shapes, *, layers_of_27b: int, period: int) -> dict[str, Any]:
    """llama.cpp knows by the number of layers how scores are scaled and which layers are local."""
    shared = _complete_shared(hf, shapes)
    layers, embed, heads = (hf.get(field) or 0 for field in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    is_27b = layers == layers_of_27b and heads
    shared["query_pre_attn_scalar"] = embed // heads if is_27b else hf.get("head_dim") or shared.get("head_dim")
    kinds = [SLIDING if (layer + 1) % period else FULL for layer in range(min(int(layers), 1 << 12))]
    return shared | {"layer_types": kinds, "hidden_activation": "gelu_pytorch_tanh"}


def _extend_gemma(hf: dict[str, Any]) -> dict[str, Any]:
    softcap = hf.get("attn_logit_softcapping")
    values: dict[str, Any] = {} if softcap is None else {"attn_logit_softcapping": softcap}
    rope = hf["rope_parameters"]
    return values | {"rope.freq_base": rope.get(FULL, rope)["rope_theta"]}


def _complete_olmo(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    del unread
    return _complete_shared(hf, shapes) | {
        "hidden_act": "silu",
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
    }


def _complete_gpt2(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    del unread
    tied = "output.weight" not in shapes
    return {"tie_word_embeddings": tied, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}


def _complete_bert(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    if unread.pop("attention.causal", False):
        raise UserError("bert.attention.causal=True is not supported")
    types = shapes.get("token_types.weight", (0,))[0]
    return {"type_vocab_size": types, "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu"}


def _complete_t5(hf: dict[str, Any], unread: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The metadata do not have the kind of feed-forward layer: one with a gate is that of T5 v1.1."""
    unread.pop("attention.layer_norm_rms_epsilon", None)  # repeats the other epsilon
    gated = "enc.blk.0.ffn_gate.weight" in shapes
    is_encoder = "dec.blk.0.attn_q.weight" not in shapes
    return {
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "is_encoder_decoder": not is_encoder,
        "architectures": ["T5EncoderModel" if is_encoder else "T5ForConditionalGeneration"],
        "model_type": "t5",
    }


def _extend_t5(hf: dict[str, Any]) -> dict[str, Any]:
    return {"attention.layer_norm_rms_epsilon": hf["layer_norm_epsilon"], "context_length": hf.get("n_positions", 512)}


def _permute_heads(name: str, hf: dict[str, Any]) -> Form:
    """Queries and keys of Llama: llama.cpp rotates neighbours, x0 y0 x1 y1, where transformers has x0 x1 y0 y1."""
    fields = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = name.split(".")[-2]
    if part not in fields:
        return Form()
    heads = hf[fields[part]]

    def swap(array: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
        shape = array.shape
        return array.reshape(heads, *sizes, *shape[1:]).swapaxes(1, 2).reshape(shape)

    return Form(lambda array: swap(array, (2, -1)), lambda array: swap(array, (-1, 2)))


def _shift_norms(name: str, hf: dict[str, Any]) -> Form:
    """Norms of Gemma multiply by 1 + weight; the stored weight has the 1 in it."""
    del hf
    return Form(lambda array: array + 1, lambda array: array - 1) if name.endswith("norm.weight") else Form()


def _transpose_linears(name: str, hf: dict[str, Any]) -> Form:
    """GPT-2 keeps its linear maps as [inputs, outputs], and GGUF all of them as [outputs, inputs]."""
    del hf
    linears = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return Form(np.transpose, np.transpose, transposed=True) if name.endswith(linears) else Form()


ARCHITECTURES = {
    "llama": GgufArchitecture(
        _LLAMA,
        ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        _complete_llama,
        _extend_llama,
        _permute_heads,
    ),
    "qwen3": GgufArchitecture(_LLAMA, ("Qwen3ForCausalLM",), _complete_qwen3),
    "qwen3moe": GgufArchitecture(_LLAMA, ("Qwen3MoeForCausalLM",), _complete_qwen3_moe, _extend_qwen3_moe),
    "gemma2": GgufArchitecture(_GEMMA, ("Gemma2ForCausalLM",), _complete_gemma2, _extend_gemma, _shift_norms),
    "gemma3": GgufArchitecture(_GEMMA, ("Gemma3ForCausalLM",), _complete_gemma3, _extend_gemma, _shift_norms),
    "olmo2": GgufArchitecture(_LLAMA, ("Olmo2ForCausalLM",), _complete_olmo),
    "gpt2": GgufArchitecture(_GPT2, ("GPT2LMHeadModel",), _complete_gpt2, form=_transpose_linears),
    "bert": GgufArchitecture(
        _BERT,
        ("BertModel",),
        _complete_bert,
        lambda hf: {"attention.causal": False, "pooling_type": 1},
        left_out=("bert.pooler.",),
    ),
    "t5": GgufArchitecture(_T5, ("T5ForConditionalGeneration",), _complete_t5, _extend_t5),
    "t5encoder": GgufArchitecture(_T5, ("T5EncoderModel",), _complete_t5, _extend_t5),
}
