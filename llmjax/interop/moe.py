"""Checkpoints with mixtures of experts: Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.interop import decoder_rules, heads
from llmjax.interop.decoder import (
    LLAMA_ACTIVATION,
    SHARED,
    list_layer_types,
    read_llama_fields,
    read_local_layers,
    write_local_layers,
)
from llmjax.interop.decoder_rules import LAYER
from llmjax.interop.hf_config import Field, Fields, constant, format_value, read_fields, write_fields
from llmjax.interop.hf_rope import write_rope
from llmjax.interop.mapping import Architecture, Rule, linear, make_linear_rules, transposed
from llmjax.models.moe import MoeConfig
from llmjax.nn.rotary import yarn_attention_factor

# About the router's losses in training, which differ from those here, and the prediction of further tokens.
_NEUTRAL = """
    router_aux_loss_coef output_router_logits router_jitter_noise aux_loss_alpha seq_aux ep_size
    num_nextn_predict_layers num_mtp_layers
""".split()  # noqa: SIM905
# Fields for training alone, and widths that a model without such layers does not use.
_UNUSED_FIELDS = ("balance_loss", "router_z_loss", "mlp", "rope_dim")
_MTP_LAYER = "model.layers.61."  # of DeepSeek-V3: predicts the token after the next one
# The frequencies of a config.json of gpt-oss that has none.
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_num_experts(fields: Fields, _: str, default: int) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    numbers = {fields.size(name) for name in names if fields.get(name, None) is not None}
    if len(numbers) > 1:
        raise UserError(f"config.json: {' and '.join(names)} differ: {sorted(numbers)}")
    return numbers.pop() if numbers else default


def _read_dense_layers(fields: Fields, name: str, _: None) -> int:
    layers = fields.get(name, None, list) or []
    if layers != list(range(len(layers))):
        raise UserError(
            f"config.json: {name}={format_value(layers)} is not supported, only the first layers, such as [0, 1]"
        )
    return len(layers)


_QWEN3 = (
    Field("num_experts", "num_experts", _read_num_experts, 128),
    Field("moe_intermediate_size", "expert_mlp", Fields.size, 768),
    Field("norm_topk_prob", "renormalise", Fields.get, False),
    constant("decoder_sparse_step", 1),
    Field("mlp_only_layers", "dense_layers", _read_dense_layers, None, lambda count: list(range(count))),
)
_DEEPSEEK = (
    Field("qk_nope_head_dim", "head_dim", Fields.size, 128),
    Field("qk_rope_head_dim", "rope_dim", Fields.size, 64),
    Field("v_head_dim", "value_dim", Fields.size, 128),
    Field("kv_lora_rank", "latent", Fields.size, 512),
    Field("q_lora_rank", "query_latent", Fields.optional_size, 1536, lambda size: size or None),
    Field("n_routed_experts", "num_experts", _read_num_experts, 256),
    Field("moe_intermediate_size", "expert_mlp", Fields.size, 2048),
    Field("n_shared_experts", "shared_experts", Fields.optional_size, 1),
    Field("first_k_dense_replace", "dense_layers", Fields.optional_size, 3),
    Field("norm_topk_prob", "renormalise", Fields.get, True),
    Field("routed_scaling_factor", "router_scale", lambda *arguments: float(Fields.positive(*arguments)), 2.5),
    Field("n_group", "router_groups", Fields.size, 8),
    Field("topk_group", "router_top_groups", Fields.size, 4),
    constant("rope_interleave", True),
)


def _read_mixtral(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("attention_bias", False)
    section = read_llama_fields(
        fields, rope_base=1e6, rms_norm_eps=1e-5, num_key_value_heads=8, max_position_embeddings=4096 * 32
    )
    section |= {
        "num_experts": _read_num_experts(fields, "num_local_experts", 8),
        "experts_per_token": fields.size("num_experts_per_tok", 2),
        "expert_mlp": section["mlp"],
    }
    window = fields.optional_size("sliding_window")
    fields.reject_unread(*_NEUTRAL)
    return section | ({"window": window, "attention_pattern": "l"} if window else {})


def _write_mixtral(config: MoeConfig) -> dict[str, Any]:
    shared = _write_shared(config, "mixtral") | {"intermediate_size": config.expert_size}
    return shared | {"num_local_experts": config.num_experts, "sliding_window": config.window or None}


def _read_qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    section = read_llama_fields(fields, num_key_value_heads=4, max_position_embeddings=32768)
    section |= read_fields(_QWEN3, fields)
    section |= {"qk_norm": "head", "experts_per_token": fields.size("num_experts_per_tok", 8)}
    fields.require("use_sliding_window", False)
    # Fields of its base classes, which the reference does not read.
    fields.require("qkv_bias", False)
    fields.require("use_qk_norm", True)
    fields.require("shared_expert_intermediate_size", 0, None)
    fields.reject_unread(*_NEUTRAL, "sliding_window", "max_window_layers")
    return section


def _write_qwen3(config: MoeConfig) -> dict[str, Any]:
    shared = _write_shared(config, "qwen3_moe") | {"attention_bias": config.biases != "none"}
    return shared | write_fields(_QWEN3, config)


def _read_gpt_oss(hf: dict[str, Any]) -> dict[str, Any]:
    if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
        hf = hf | {"rope_parameters": _GPT_OSS_ROPE}
    fields = Fields({"head_dim": 64, "attention_bias": True} | hf)
    fields.require("attention_bias", True)
    fields.require("hidden_act", "silu")  # but the experts have their own variant of it
    fields.require("swiglu_alpha", 1.702)
    fields.require("swiglu_limit", 7.0)
    section = read_llama_fields(
        fields, rope_base=150_000.0, rms_norm_eps=1e-5, num_key_value_heads=8, max_position_embeddings=131072
    )
    section |= read_local_layers(fields, default=list_layer_types(fields["num_hidden_layers"], 2), window=128)
    section |= {
        "biases": "all",
        "attention_sinks": True,
        "expert_activation": "clamped_swiglu",
        "num_experts": _read_num_experts(fields, "num_local_experts", 128),
        "experts_per_token": fields.size("num_experts_per_tok", 4),
        "expert_mlp": section["mlp"],
    }
    fields.reject_unread(*_NEUTRAL, "experts_per_token", "initial_context_length")
    return section


def _write_gpt_oss(config: MoeConfig) -> dict[str, Any]:
    return {
        **_write_shared(config, "gpt_oss"),
        **write_local_layers(config),
        "attention_bias": True,
        "intermediate_size": config.expert_size,
        "num_local_experts": config.num_experts,
    }


def _read_deepseek(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("attention_bias", False)
    fields.require("moe_layer_freq", 1)
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    fields.require("num_key_value_heads", None, fields["num_attention_heads"])
    section = read_llama_fields(fields, max_position_embeddings=4096) | read_fields(_DEEPSEEK, fields)
    section |= {"num_kv_heads": 0, "router": "sigmoid", "expert_bias": True}
    section |= {"experts_per_token": fields.size("num_experts_per_tok", 8)}
    fields.reject_unread(*_NEUTRAL, "qk_head_dim")
    return section | _read_score_scale(hf, section)


def _read_score_scale(hf: dict[str, Any], section: dict[str, Any]) -> dict[str, float]:
    """With YaRN, scores have another factor besides that of cos and sin."""
    weight = (hf.get("rope_scaling") or hf.get("rope_parameters") or {}).get("mscale_all_dim", 0)
    if not weight or "rope_scaling" not in section:
        return {}
    factor = yarn_attention_factor(section["rope_factor"], weight) ** 2
    return {"score_scale": factor * (section["head_dim"] + section["rope_dim"]) ** -0.5}


def _write_deepseek(config: MoeConfig) -> dict[str, Any]:
    hf = _write_shared(config, "deepseek_v3") | write_fields(_DEEPSEEK, config)
    hf |= {"num_key_value_heads": config.num_heads, "head_dim": config.rope_dim}
    if config.score_scale and config.rope_factor > 1:
        factor = math.sqrt(config.score_scale / config.latent_scale)
        hf["rope_parameters"]["mscale_all_dim"] = round((factor - 1) / (0.1 * math.log(config.rope_factor)), 6)
    return hf


def _write_shared(config: MoeConfig, model_type: str) -> dict[str, Any]:
    shared = {"model_type": model_type, **write_fields(SHARED, config), **write_rope(config)}
    return shared | {"num_experts_per_tok": config.experts_per_token, **write_fields(LLAMA_ACTIVATION, config)}


def _make_mixtral_rules(config: MoeConfig) -> list[Rule]:
    """w1, w2 and w3 are gate, down and up."""
    experts = _make_expert_rules(config, "block_sparse_moe", ("w1", "w3", "w2"))
    return decoder_rules.make_rules_without_mlp(config) + experts


def _make_qwen3_rules(config: MoeConfig) -> list[Rule]:
    """Like Mixtral, with norms of queries and keys; the first layers may have no experts."""
    shared = decoder_rules.make_block_norm_rules(config) + decoder_rules.make_attention_rules(config)
    layers = _make_layer_rules(config, shared, _make_gated_expert_rules(config))
    return decoder_rules.make_end_rules(config) + layers


def _make_deepseek_rules(config: MoeConfig) -> list[Rule]:
    """Latent attention, shared experts, and first layers without experts."""
    in_every_layer = decoder_rules.make_block_norm_rules(config) + _make_latent_attention_rules(config)
    bias = Rule(LAYER + "mlp.gate.e_score_correction_bias", ("blocks.mlp.router.expert_bias",))
    embed, width = (config.embed,), (config.shared_experts * config.expert_size,)
    shared_expert = [
        *make_linear_rules(LAYER + "mlp.shared_experts.gate_proj", "blocks.mlp.shared.gate", embed, width, bias=False),
        *make_linear_rules(LAYER + "mlp.shared_experts.up_proj", "blocks.mlp.shared.up", embed, width, bias=False),
        *make_linear_rules(LAYER + "mlp.shared_experts.down_proj", "blocks.mlp.shared.down", width, embed, bias=False),
    ]
    experts = [*_make_gated_expert_rules(config), bias, *(shared_expert if config.shared_experts else [])]
    return decoder_rules.make_end_rules(config) + _make_layer_rules(config, in_every_layer, experts)


def _rename_deepseek(name: str) -> str | None:
    """Leave out the layer that predicts a further token, as transformers does."""
    return None if name.startswith(_MTP_LAYER) else name


def _make_gpt_oss_rules(config: MoeConfig) -> list[Rule]:
    """One tensor has all experts of a layer; gate and up alternate in its last dimension."""
    interleaved = {
        "from_hf": lambda tensor: (tensor[..., 0::2], tensor[..., 1::2]),
        "to_hf": lambda gate, up: np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1),
    }
    hf_block, block = LAYER + "mlp.", "blocks.mlp."
    names = lambda suffix: (f"{block}experts.gate{suffix}", f"{block}experts.up{suffix}")
    return [
        *decoder_rules.make_rules_without_mlp(config),
        Rule(hf_block + "router.weight", (block + "router.weight",), **transposed()),
        Rule(hf_block + "router.bias", (block + "router.bias",)),
        Rule(hf_block + "experts.gate_up_proj", names(""), **interleaved),
        Rule(hf_block + "experts.gate_up_proj_bias", names("_bias"), **interleaved),
        Rule(hf_block + "experts.down_proj", (block + "experts.down",)),
        Rule(hf_block + "experts.down_proj_bias", (block + "experts.down_bias",)),
    ]


def _make_gated_expert_rules(config: MoeConfig) -> list[Rule]:
    return _make_expert_rules(config, "mlp", ("gate_proj", "up_proj", "down_proj"))


def _make_expert_rules(config: MoeConfig, module: str, names: tuple[str, str, str]) -> list[Rule]:
    """The router, and three tensors for each expert; `names` are those of gate, up and down."""
    embed, width = (config.embed,), (config.expert_size,)
    shapes = zip(("gate", "up", "down"), names, ((embed, width), (embed, width), (width, embed)), strict=True)
    router = Rule(f"{LAYER}{module}.gate.weight", ("blocks.mlp.router.weight",), **transposed())
    return [router] + [
        Rule(f"{LAYER}{module}.experts.{{expert}}.{hf_name}.weight", (f"blocks.mlp.experts.{name}",), **linear(*ends))
        for name, hf_name, ends in shapes
    ]


def _make_latent_attention_rules(config: MoeConfig) -> list[Rule]:
    embed, heads, plain, rope = config.embed, config.num_heads, config.head_size, config.rope_dim
    latent, value_size, query_inputs = config.latent, config.value_size, config.query_latent or config.embed
    hf_attention, attention = LAYER + "self_attn.", "blocks.attention."

    def query_from_hf(tensor: Any) -> tuple[Any]:
        query = tensor.reshape(heads, plain + rope, query_inputs)
        query = np.concatenate([query[:, :plain], _split_pairs(query[:, plain:], 1)], axis=1)
        return (query.transpose(2, 0, 1),)

    def query_to_hf(query: Any) -> Any:
        query = query.transpose(1, 2, 0)
        query = np.concatenate([query[:, :plain], _interleave(query[:, plain:], 1)], axis=1)
        return query.reshape(-1, query_inputs)

    def key_value_from_hf(tensor: Any) -> tuple[Any, Any]:
        key_value = tensor.reshape(heads, plain + value_size, latent).transpose(2, 0, 1)
        return key_value[..., :plain], key_value[..., plain:]

    def key_value_to_hf(key: Any, value: Any) -> Any:
        return np.concatenate([key, value], axis=-1).transpose(1, 2, 0).reshape(-1, latent)

    query_name = "q_b_proj" if config.query_latent else "q_proj"
    rules = [
        Rule(f"{hf_attention}{query_name}.weight", (attention + "query.weight",), query_from_hf, query_to_hf),
        Rule(
            hf_attention + "kv_a_proj_with_mqa.weight",
            (attention + "latent.weight", attention + "key_rope.weight"),
            lambda tensor: (tensor[:latent].T, _split_pairs(tensor[latent:], 0).T),
            lambda c, key: np.concatenate([c.T, _interleave(key.T, 0)]),
        ),
        Rule(hf_attention + "kv_a_layernorm.weight", (attention + "latent_norm.scale",)),
        Rule(
            hf_attention + "kv_b_proj.weight",
            (attention + "key.weight", attention + "value.weight"),
            key_value_from_hf,
            key_value_to_hf,
        ),
        Rule(hf_attention + "o_proj.weight", (attention + "out.weight",), **linear((heads, value_size), (embed,))),
    ]
    if config.query_latent:
        down = linear((embed,), (config.query_latent,))
        rules.append(Rule(hf_attention + "q_a_proj.weight", (attention + "query_down.weight",), **down))
        rules.append(Rule(hf_attention + "q_a_layernorm.weight", (attention + "query_norm.scale",)))
    return rules


def _split_pairs(tensor: Any, dim: int) -> Any:
    """Reorder rotated dimensions from that of the files, x0 y0 x1 y1, to that of rotary.rotate, x0 x1 y0 y1."""
    return _transpose_pairs(tensor, dim, (-1, 2))


def _interleave(tensor: Any, dim: int) -> Any:
    """The inverse of `_split_pairs`."""
    return _transpose_pairs(tensor, dim, (2, -1))


def _transpose_pairs(tensor: Any, dim: int, sizes: Sequence[int]) -> Any:
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], *sizes, *shape[dim + 1 :]).swapaxes(dim, dim + 1).reshape(shape)


def _make_layer_rules(config: MoeConfig, shared: list[Rule], experts: list[Rule]) -> list[Rule]:
    """Rules of all layers: the first ones, dense_blocks, have no experts, the others are blocks.

    shared    rules of every layer
    experts   rules of the layers with experts
    """
    num_dense, dense = config.dense_layers, decoder_rules.make_mlp_rules(config)
    rules = [dataclasses.replace(rule, layers=tuple(range(num_dense, config.num_layers))) for rule in shared + experts]
    if num_dense:
        dense_names = lambda rule: tuple(name.replace("blocks.", "dense_blocks.", 1) for name in rule.names)
        rules += [dataclasses.replace(rule, names=dense_names(rule)) for rule in shared + dense]
    return rules


ARCHITECTURES = {
    "MixtralForCausalLM": Architecture(
        _read_mixtral, _write_mixtral, _make_mixtral_rules, unused_fields=_UNUSED_FIELDS
    ),
    "Qwen3MoeForCausalLM": Architecture(_read_qwen3, _write_qwen3, _make_qwen3_rules, unused_fields=_UNUSED_FIELDS),
    "GptOssForCausalLM": Architecture(
        _read_gpt_oss, _write_gpt_oss, _make_gpt_oss_rules, unused_fields=(*_UNUSED_FIELDS, "activation")
    ),
    "DeepseekV3ForCausalLM": Architecture(
        _read_deepseek,
        _write_deepseek,
        _make_deepseek_rules,
        _rename_deepseek,
        ("balance_loss", "router_z_loss", "mlp"),
    ),
}
for _stem in ("Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3"):
    ARCHITECTURES = heads.add_variants(ARCHITECTURES, f"{_stem}ForCausalLM", _stem, "model.", ("lm_head.",))
