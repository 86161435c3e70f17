"""Checkpoints with mixtures of experts: Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.interop import decoder_rules
from llmjax.interop.decoder import (
    every_nth_global,
    read_local_layers,
    read_shared_fields,
    write_local_layers,
    write_shared_fields,
)
from llmjax.interop.decoder_rules import LAYER
from llmjax.interop.hf_config import MAX_EXPERTS, Fields, read_rope, shown, write_rope
from llmjax.interop.mapping import Architecture, Rule, linear, transposed
from llmjax.models.base import MAX_LAYERS
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


def _read_activation(fields: Fields) -> dict[str, Any]:
    return {"activation": fields.choice("hidden_act", {"silu": "silu", "gelu": "gelu", "relu": "relu"}, "silu")}


def _read_mixtral(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("attention_bias", False)
    section = read_shared_fields(fields, eps=1e-5, kv_heads=8, positions=4096 * 32) | _read_activation(fields)
    section |= read_rope(fields, base=1e6, max_length=section["max_positions"])
    section |= {
        "num_experts": _read_num_experts(fields, 8),
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
    section = read_shared_fields(fields, kv_heads=4, positions=32768) | _read_activation(fields)
    section |= read_rope(fields, base=10_000.0, max_length=section["max_positions"])
    fields.require("use_sliding_window", False)
    fields.require("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", None, list) or []
    if dense != list(range(len(dense))):
        raise UserError(
            f"config.json: mlp_only_layers={shown(dense)} is not supported, only the first layers, such as [0, 1]"
        )
    # Fields of its base classes, which the reference does not read.
    fields.require("qkv_bias", False)
    fields.require("use_qk_norm", True)
    fields.require("shared_expert_intermediate_size", 0, None)
    section |= {
        "qk_norm": "head",
        "num_experts": _read_num_experts(fields, 128),
        "experts_per_token": fields.size("num_experts_per_tok", 8),
        "expert_mlp": fields.size("moe_intermediate_size", 768),
        "renormalise": fields.get("norm_topk_prob", False),
        "dense_layers": len(dense),
    }
    fields.reject_unread(*_NEUTRAL, "sliding_window", "max_window_layers")
    return section


def _write_qwen3(config: MoeConfig) -> dict[str, Any]:
    return _write_shared(config, "qwen3_moe") | {
        "attention_bias": config.biases != "none",
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.dense_layers)),
    }


def _read_gpt_oss(hf: dict[str, Any]) -> dict[str, Any]:
    if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
        hf = hf | {"rope_parameters": _GPT_OSS_ROPE}
    fields = Fields({"head_dim": 64, "attention_bias": True} | hf)
    fields.require("attention_bias", True)
    fields.require("hidden_act", "silu")  # but the experts have their own variant of it
    fields.require("swiglu_alpha", 1.702)
    fields.require("swiglu_limit", 7.0)
    section = read_shared_fields(fields, eps=1e-5, kv_heads=8, positions=131072)
    section |= read_rope(fields, base=150_000.0, max_length=section["max_positions"])
    section |= read_local_layers(fields, default=every_nth_global(fields["num_hidden_layers"], 2), window=128)
    section |= {
        "biases": "all",
        "attention_sinks": True,
        "expert_activation": "clamped_swiglu",
        "num_experts": _read_num_experts(fields, 128),
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
    fields.require("rope_interleave", True)
    fields.require("moe_layer_freq", 1)
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    fields.require("num_key_value_heads", None, fields["num_attention_heads"])
    section = read_shared_fields(fields, positions=4096) | _read_activation(fields)
    section |= read_rope(fields, base=10_000.0, max_length=section["max_positions"])
    section |= {
        "num_kv_heads": 0,
        "head_dim": fields.size("qk_nope_head_dim", 128),
        "rope_dim": fields.size("qk_rope_head_dim", 64),
        "value_dim": fields.size("v_head_dim", 128),
        "latent": fields.size("kv_lora_rank", 512),
        "query_latent": fields.optional_size("q_lora_rank", 1536),
        "num_experts": _read_num_experts(fields, 256),
        "experts_per_token": fields.size("num_experts_per_tok", 8),
        "expert_mlp": fields.size("moe_intermediate_size", 2048),
        "shared_experts": fields.optional_size("n_shared_experts", 1, MAX_EXPERTS),
        "dense_layers": fields.optional_size("first_k_dense_replace", 3, MAX_LAYERS),
        "router": "sigmoid",
        "expert_bias": True,
        "renormalise": fields.get("norm_topk_prob", True),
        "router_scale": float(fields.positive("routed_scaling_factor", 2.5)),
        "router_groups": fields.size("n_group", 8),
        "router_top_groups": fields.size("topk_group", 4),
    }
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
    hf = _write_shared(config, "deepseek_v3") | {
        "num_key_value_heads": config.num_heads,
        "head_dim": config.rope_dim,
        "qk_nope_head_dim": config.head_size,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.value_size,
        "kv_lora_rank": config.latent,
        "q_lora_rank": config.query_latent or None,
        "n_routed_experts": config.num_experts,
        "moe_intermediate_size": config.expert_size,
        "n_shared_experts": config.shared_experts,
        "first_k_dense_replace": config.dense_layers,
        "norm_topk_prob": config.renormalise,
        "routed_scaling_factor": config.router_scale,
        "n_group": config.router_groups,
        "topk_group": config.router_top_groups,
        "rope_interleave": True,
    }
    if config.score_scale and config.rope_factor > 1:
        factor = math.sqrt(config.score_scale / config.latent_scale)
        hf["rope_parameters"]["mscale_all_dim"] = round((factor - 1) / (0.1 * math.log(config.rope_factor)), 6)
    return hf


def _read_num_experts(fields: Fields, default: int) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    numbers = {fields.size(name, most=MAX_EXPERTS) for name in names if fields.get(name, None) is not None}
    if len(numbers) > 1:
        raise UserError(f"config.json: {' and '.join(names)} differ: {sorted(numbers)}")
    return numbers.pop() if numbers else default


def _write_shared(config: MoeConfig, model_type: str) -> dict[str, Any]:
    shared = (
        write_shared_fields(config, model_type) | write_rope(config) | {"num_experts_per_tok": config.experts_per_token}
    )
    del shared["attention_bias"]
    return shared | {"hidden_act": config.activation}


def _mixtral_rules(config: MoeConfig) -> list[Rule]:
    """w1, w2 and w3 are gate, down and up."""
    return [
        *decoder_rules.ends(config),
        *decoder_rules.norms(config),
        *decoder_rules.attention(config),
        *_expert_rules(config, "block_sparse_moe", ("w1", "w3", "w2")),
    ]


def _qwen3_rules(config: MoeConfig) -> list[Rule]:
    """Like Mixtral, with norms of queries and keys; the first layers may have no experts."""
    shared = decoder_rules.norms(config) + decoder_rules.attention(config)
    return decoder_rules.ends(config) + _layers(config, shared, decoder_rules.mlp(config), _gated_experts(config))


def _deepseek_rules(config: MoeConfig) -> list[Rule]:
    """Latent attention, shared experts, and first layers without experts."""
    in_every_layer = decoder_rules.norms(config) + _latent_attention(config)
    bias = Rule(LAYER + "mlp.gate.e_score_correction_bias", ("blocks.mlp.router.expert_bias",))
    embed, width = (config.embed,), (config.shared_experts * config.expert_size,)
    shared_expert = [
        Rule(f"{LAYER}mlp.shared_experts.{name}_proj.weight", (f"blocks.mlp.shared.{name}.weight",), **linear(*ends))
        for name, ends in {"gate": (embed, width), "up": (embed, width), "down": (width, embed)}.items()
    ]
    experts = [*_gated_experts(config), bias, *(shared_expert if config.shared_experts else [])]
    return decoder_rules.ends(config) + _layers(config, in_every_layer, decoder_rules.mlp(config), experts)


def _deepseek_name(name: str) -> str | None:
    """Leave out the layer that predicts a further token, as transformers does."""
    return None if name.startswith(_MTP_LAYER) else name


def _gpt_oss_rules(config: MoeConfig) -> list[Rule]:
    """One tensor has all experts of a layer; gate and up alternate in its last dimension."""
    interleaved = {
        "from_hf": lambda tensor: (tensor[..., 0::2], tensor[..., 1::2]),
        "to_hf": lambda gate, up: np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1),
    }
    hf_block, block = LAYER + "mlp.", "blocks.mlp."
    names = lambda suffix: (f"{block}experts.gate{suffix}", f"{block}experts.up{suffix}")
    return [
        *decoder_rules.ends(config),
        *decoder_rules.norms(config),
        *decoder_rules.attention(config),
        Rule(hf_block + "router.weight", (block + "router.weight",), **transposed()),
        Rule(hf_block + "router.bias", (block + "router.bias",)),
        Rule(hf_block + "experts.gate_up_proj", names(""), **interleaved),
        Rule(hf_block + "experts.gate_up_proj_bias", names("_bias"), **interleaved),
        Rule(hf_block + "experts.down_proj", (block + "experts.down",)),
        Rule(hf_block + "experts.down_proj_bias", (block + "experts.down_bias",)),
    ]


def _gated_experts(config: MoeConfig) -> list[Rule]:
    return _expert_rules(config, "mlp", ("gate_proj", "up_proj", "down_proj"))


def _expert_rules(config: MoeConfig, module: str, names: tuple[str, str, str]) -> list[Rule]:
    """The router, and three tensors for each expert; `names` are those of gate, up and down."""
    embed, width = (config.embed,), (config.expert_size,)
    shapes = zip(("gate", "up", "down"), names, ((embed, width), (embed, width), (width, embed)), strict=True)
    router = Rule(f"{LAYER}{module}.gate.weight", ("blocks.mlp.router.weight",), **transposed())
    return [router] + [
        Rule(f"{LAYER}{module}.experts.{{expert}}.{hf_name}.weight", (f"blocks.mlp.experts.{name}",), **linear(*ends))
        for name, hf_name, ends in shapes
    ]


def _latent_attention(config: MoeConfig) -> list[Rule]:
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


def _layers(config: MoeConfig, shared: list[Rule], dense: list[Rule], experts: list[Rule]) -> list[Rule]:
    """Rules of all layers: the first ones, dense_blocks, have no experts, the others are blocks.

    shared   rules of every layer; `dense` and `experts` are those of one of the two kinds
    """
    num_dense = config.dense_layers
    rules = [dataclasses.replace(rule, layers=tuple(range(num_dense, config.num_layers))) for rule in shared + experts]
    if num_dense:
        dense_names = lambda rule: tuple(name.replace("blocks.", "dense_blocks.", 1) for name in rule.names)
        rules += [dataclasses.replace(rule, names=dense_names(rule)) for rule in shared + dense]
    return rules


ARCHITECTURES = {
    "MixtralForCausalLM": Architecture(
        read_config=_read_mixtral, write_config=_write_mixtral, rules=_mixtral_rules, unused_fields=_UNUSED_FIELDS
    ),
    "Qwen3MoeForCausalLM": Architecture(
        read_config=_read_qwen3, write_config=_write_qwen3, rules=_qwen3_rules, unused_fields=_UNUSED_FIELDS
    ),
    "GptOssForCausalLM": Architecture(
        read_config=_read_gpt_oss,
        write_config=_write_gpt_oss,
        rules=_gpt_oss_rules,
        unused_fields=(*_UNUSED_FIELDS, "activation"),
    ),
    "DeepseekV3ForCausalLM": Architecture(
        read_config=_read_deepseek,
        write_config=_write_deepseek,
        rules=_deepseek_rules,
        rename=_deepseek_name,
        unused_fields=("balance_loss", "router_z_loss", "mlp"),
    ),
}
