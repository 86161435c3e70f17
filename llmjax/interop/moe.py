"""Checkpoints with mixtures of experts: Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.interop import decoder_rules
from llmjax.interop.decoder import every, layer_types, shared_fields, shared_json, windows
from llmjax.interop.decoder_rules import LAYER
from llmjax.interop.hf_config import MAX_EXPERTS, MAX_LAYERS, Fields, read_rope, shown, write_rope
from llmjax.interop.mapping import Architecture, Rule, matrix, transposed
from llmjax.models.moe import MoeConfig
from llmjax.nn.rotary import yarn_attention_factor

# Of the router's loss in training, which differs from ours; and of what is computed for several tokens ahead.
_NEUTRAL = (
    "router_aux_loss_coef",
    "output_router_logits",
    "router_jitter_noise",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
    "num_nextn_predict_layers",
    "num_mtp_layers",
)
# What training alone knows of, and widths without effect: mlp is written as it is where there are dense layers.
_FREE = ("balance_loss", "router_z_loss", "rope_dim")
_MTP = "model.layers.61."  # of DeepSeek-V3: a layer that predicts the token after the next, and is not run here
# What a config.json of gpt-oss stands for that says nothing of its frequencies.
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _activation(fields: Fields) -> dict[str, Any]:
    return {"activation": fields.choice("hidden_act", {"silu": "silu", "gelu": "gelu", "relu": "relu"}, "silu")}


def _read_mixtral(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("attention_bias", False)
    section = shared_fields(fields, eps=1e-5, kv_heads=8, positions=4096 * 32) | _activation(fields)
    section |= read_rope(fields, base=1e6, longest=section["max_positions"])
    section |= {
        "num_experts": _experts(fields, 8),
        "experts_per_token": fields.size("num_experts_per_tok", 2),
        "expert_mlp": section["mlp"],
    }
    window = fields.optional_size("sliding_window")
    fields.reject_unread(*_NEUTRAL)
    return section | ({"window": window, "attention_pattern": "l"} if window else {})


def _write_mixtral(config: MoeConfig) -> dict[str, Any]:
    shared = _json(config, "mixtral") | {"intermediate_size": config.expert_size}
    return shared | {"num_local_experts": config.num_experts, "sliding_window": config.window or None}


def _read_qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    section = shared_fields(fields, kv_heads=4, positions=32768) | _activation(fields)
    section |= read_rope(fields, base=10_000.0, longest=section["max_positions"])
    fields.require("use_sliding_window", False)
    fields.require("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", None, list) or []
    if dense != list(range(len(dense))):
        raise UserError(
            f"config.json: mlp_only_layers={shown(dense)} is not supported, only the first layers, such as [0, 1]"
        )
    # Fields of the classes that it descends from, which the reference does not read.
    fields.require("qkv_bias", False)
    fields.require("use_qk_norm", True)
    fields.require("shared_expert_intermediate_size", 0, None)
    section |= {
        "qk_norm": "head",
        "num_experts": _experts(fields, 128),
        "experts_per_token": fields.size("num_experts_per_tok", 8),
        "expert_mlp": fields.size("moe_intermediate_size", 768),
        "renormalise": fields.get("norm_topk_prob", False),
        "dense_layers": len(dense),
    }
    fields.reject_unread(*_NEUTRAL, "sliding_window", "max_window_layers")
    return section


def _write_qwen3(config: MoeConfig) -> dict[str, Any]:
    return _json(config, "qwen3_moe") | {
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
    fields.require("hidden_act", "silu")  # of which its experts have a variant of their own
    fields.require("swiglu_alpha", 1.702)
    fields.require("swiglu_limit", 7.0)
    section = shared_fields(fields, eps=1e-5, kv_heads=8, positions=131072)
    section |= read_rope(fields, base=150_000.0, longest=section["max_positions"])
    section |= windows(fields, default=every(fields["num_hidden_layers"], 2), window=128)
    section |= {
        "biases": "all",
        "attention_sinks": True,
        "expert_activation": "clamped_swiglu",
        "num_experts": _experts(fields, 128),
        "experts_per_token": fields.size("num_experts_per_tok", 4),
        "expert_mlp": section["mlp"],
    }
    fields.reject_unread(*_NEUTRAL, "experts_per_token", "initial_context_length")
    return section


def _write_gpt_oss(config: MoeConfig) -> dict[str, Any]:
    return (
        _json(config, "gpt_oss")
        | layer_types(config)
        | {
            "attention_bias": True,
            "intermediate_size": config.expert_size,
            "num_local_experts": config.num_experts,
        }
    )


def _read_deepseek(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("attention_bias", False)
    fields.require("rope_interleave", True)
    fields.require("moe_layer_freq", 1)
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    fields.require("num_key_value_heads", None, fields["num_attention_heads"])
    section = shared_fields(fields, positions=4096) | _activation(fields)
    section |= read_rope(fields, base=10_000.0, longest=section["max_positions"])
    section |= {
        "num_kv_heads": 0,
        "head_dim": fields.size("qk_nope_head_dim", 128),
        "rope_dim": fields.size("qk_rope_head_dim", 64),
        "value_dim": fields.size("v_head_dim", 128),
        "latent": fields.size("kv_lora_rank", 512),
        "query_latent": fields.optional_size("q_lora_rank", 1536),
        "num_experts": _experts(fields, 256),
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
    """With YaRN, the scores' scale has a factor of its own, beside the one of cos and sin."""
    weight = (hf.get("rope_scaling") or hf.get("rope_parameters") or {}).get("mscale_all_dim", 0)
    if not weight or "rope_scaling" not in section:
        return {}
    own = yarn_attention_factor(section["rope_factor"], weight) ** 2
    return {"score_scale": own * (section["head_dim"] + section["rope_dim"]) ** -0.5}


def _write_deepseek(config: MoeConfig) -> dict[str, Any]:
    written = _json(config, "deepseek_v3") | {
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
        own = math.sqrt(config.score_scale / config.latent_scale)
        written["rope_parameters"]["mscale_all_dim"] = round((own - 1) / (0.1 * math.log(config.rope_factor)), 6)
    return written


def _experts(fields: Fields, default: int) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    given = {fields.size(name, most=MAX_EXPERTS) for name in names if fields.get(name, None) is not None}
    if len(given) > 1:
        raise UserError(f"config.json: {' and '.join(names)} differ: {sorted(given)}")
    return given.pop() if given else default


def _json(config: MoeConfig, model_type: str) -> dict[str, Any]:
    shared = shared_json(config, model_type) | write_rope(config) | {"num_experts_per_tok": config.experts_per_token}
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
    """As Mixtral, with norms of queries and keys, and perhaps first layers without experts."""
    both = decoder_rules.norms(config) + decoder_rules.attention(config)
    return decoder_rules.ends(config) + _layers(config, both, decoder_rules.mlp(config), _gated_experts(config))


def _deepseek_rules(config: MoeConfig) -> list[Rule]:
    """Latent attention, shared experts, and first layers without experts."""
    both = decoder_rules.norms(config) + _latent_attention(config)
    bias = Rule(LAYER + "mlp.gate.e_score_correction_bias", ("blocks.mlp.router.expert_bias",))
    embed, width = (config.embed,), (config.shared_experts * config.expert_size,)
    shared = [
        Rule(f"{LAYER}mlp.shared_experts.{name}_proj.weight", (f"blocks.mlp.shared.{name}.weight",), **matrix(*ends))
        for name, ends in {"gate": (embed, width), "up": (embed, width), "down": (width, embed)}.items()
    ]
    experts = [*_gated_experts(config), bias, *(shared if config.shared_experts else [])]
    return decoder_rules.ends(config) + _layers(config, both, decoder_rules.mlp(config), experts)


def _deepseek_name(name: str) -> str | None:
    """The layer that predicts a further token is left out, as transformers does."""
    return None if name.startswith(_MTP) else name


def _gpt_oss_rules(config: MoeConfig) -> list[Rule]:
    """All experts of a layer in one tensor, whose last dimension has gate and up by turns."""
    turns = {
        "from_hf": lambda tensor: (tensor[..., 0::2], tensor[..., 1::2]),
        "to_hf": lambda gate, up: np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1),
    }
    block, ours = LAYER + "mlp.", "blocks.mlp."
    names = lambda suffix: (f"{ours}experts.gate{suffix}", f"{ours}experts.up{suffix}")
    return [
        *decoder_rules.ends(config),
        *decoder_rules.norms(config),
        *decoder_rules.attention(config),
        Rule(block + "router.weight", (ours + "router.weight",), **transposed()),
        Rule(block + "router.bias", (ours + "router.bias",)),
        Rule(block + "experts.gate_up_proj", names(""), **turns),
        Rule(block + "experts.gate_up_proj_bias", names("_bias"), **turns),
        Rule(block + "experts.down_proj", (ours + "experts.down",)),
        Rule(block + "experts.down_proj_bias", (ours + "experts.down_bias",)),
    ]


def _gated_experts(config: MoeConfig) -> list[Rule]:
    return _expert_rules(config, "mlp", ("gate_proj", "up_proj", "down_proj"))


def _expert_rules(config: MoeConfig, module: str, names: tuple[str, str, str]) -> list[Rule]:
    """The router, and each expert's three matrices in tensors of their own; `names` of gate, up and down."""
    embed, width = (config.embed,), (config.expert_size,)
    shapes = zip(("gate", "up", "down"), names, ((embed, width), (embed, width), (width, embed)), strict=True)
    router = Rule(f"{LAYER}{module}.gate.weight", ("blocks.mlp.router.weight",), **transposed())
    return [router] + [
        Rule(f"{LAYER}{module}.experts.{{expert}}.{theirs}.weight", (f"blocks.mlp.experts.{ours}",), **matrix(*ends))
        for ours, theirs, ends in shapes
    ]


def _latent_attention(config: MoeConfig) -> list[Rule]:
    embed, heads, plain, rope = config.embed, config.num_heads, config.head_size, config.rope_dim
    latent, value, source = config.latent, config.value_size, config.query_latent or config.embed
    attention, ours = LAYER + "self_attn.", "blocks.attention."

    def take_query(tensor: Any) -> tuple[Any]:
        found = tensor.reshape(heads, plain + rope, source)
        found = np.concatenate([found[:, :plain], _halves(found[:, plain:], 1)], axis=1)
        return (found.transpose(2, 0, 1),)

    def give_query(array: Any) -> Any:
        found = array.transpose(1, 2, 0)
        found = np.concatenate([found[:, :plain], _pairs(found[:, plain:], 1)], axis=1)
        return found.reshape(-1, source)

    def take_key_value(tensor: Any) -> tuple[Any, Any]:
        found = tensor.reshape(heads, plain + value, latent).transpose(2, 0, 1)
        return found[..., :plain], found[..., plain:]

    def give_key_value(key: Any, value: Any) -> Any:
        return np.concatenate([key, value], axis=-1).transpose(1, 2, 0).reshape(-1, latent)

    query = "q_b_proj" if config.query_latent else "q_proj"
    rules = [
        Rule(f"{attention}{query}.weight", (ours + "query.weight",), take_query, give_query),
        Rule(
            attention + "kv_a_proj_with_mqa.weight",
            (ours + "latent.weight", ours + "key_rope.weight"),
            lambda tensor: (tensor[:latent].T, _halves(tensor[latent:], 0).T),
            lambda c, key: np.concatenate([c.T, _pairs(key.T, 0)]),
        ),
        Rule(attention + "kv_a_layernorm.weight", (ours + "latent_norm.scale",)),
        Rule(
            attention + "kv_b_proj.weight", (ours + "key.weight", ours + "value.weight"), take_key_value, give_key_value
        ),
        Rule(attention + "o_proj.weight", (ours + "out.weight",), **matrix((heads, value), (embed,))),
    ]
    if config.query_latent:
        down = matrix((embed,), (config.query_latent,))
        rules.append(Rule(attention + "q_a_proj.weight", (ours + "query_down.weight",), **down))
        rules.append(Rule(attention + "q_a_layernorm.weight", (ours + "query_norm.scale",)))
    return rules


def _halves(tensor: Any, dim: int) -> Any:
    """Rotated dimensions that lie on disk in pairs, x0 y0 x1 y1, in the order that rotary.rotate takes: x0 x1 y0 y1."""
    return _turn(tensor, dim, (-1, 2))


def _pairs(tensor: Any, dim: int) -> Any:
    """The inverse of `_halves`."""
    return _turn(tensor, dim, (2, -1))


def _turn(tensor: Any, dim: int, sizes: Sequence[int]) -> Any:
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], *sizes, *shape[dim + 1 :]).swapaxes(dim, dim + 1).reshape(shape)


def _layers(config: MoeConfig, both: list[Rule], dense: list[Rule], experts: list[Rule]) -> list[Rule]:
    """Rules of layers, `both` of all of them, as those of dense_blocks, which come first on disk, and of blocks."""
    count = config.dense_layers
    rest = range(count, config.num_layers)
    rules = [dataclasses.replace(rule, layers=tuple(rest)) for rule in both + experts]
    if count:
        ours = lambda rule: tuple(name.replace("blocks.", "dense_blocks.", 1) for name in rule.names)
        rules += [dataclasses.replace(rule, names=ours(rule)) for rule in both + dense]
    return rules


ARCHITECTURES = {
    "MixtralForCausalLM": Architecture(
        read_config=_read_mixtral, write_config=_write_mixtral, rules=_mixtral_rules, free=(*_FREE, "mlp")
    ),
    "Qwen3MoeForCausalLM": Architecture(
        read_config=_read_qwen3, write_config=_write_qwen3, rules=_qwen3_rules, free=(*_FREE, "mlp")
    ),
    "GptOssForCausalLM": Architecture(
        read_config=_read_gpt_oss,
        write_config=_write_gpt_oss,
        rules=_gpt_oss_rules,
        free=(*_FREE, "mlp", "activation"),
    ),
    "DeepseekV3ForCausalLM": Architecture(
        read_config=_read_deepseek,
        write_config=_write_deepseek,
        rules=_deepseek_rules,
        rename=_deepseek_name,
        free=("balance_loss", "router_z_loss", "mlp"),
    ),
}
