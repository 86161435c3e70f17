"""Decoder-only checkpoints: GPT-2 and Llama."""

from typing import Any

import numpy as np

from llmjax.interop.fields import Fields
from llmjax.interop.layouts import matrix, straight, transposed, vector
from llmjax.interop.mapping import Architecture, Rule
from llmjax.models.decoder_config import DecoderConfig

_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_GPT2_NEUTRAL = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "n_ctx",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)


def _read_gpt2(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.must("scale_attn_weights", True)
    fields.must("scale_attn_by_inverse_layer_idx", False)
    fields.must("reorder_and_upcast_attn", False)
    fields.must("add_cross_attention", False)
    section = {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["n_layer"],
        "embed": fields["n_embd"],
        "num_heads": fields["n_head"],
        "mlp": fields.get("n_inner", None) or 4 * fields["n_embd"],
        "activation": fields.choice("activation_function", _GPT2_ACTIVATIONS, "gelu_new"),
        "gated": "plain",
        "norm": "layernorm",
        "norm_eps": fields.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "max_positions": fields["n_positions"],
        "tied": "tied" if fields.get("tie_word_embeddings", True) else "untied",
        "biases": "all",
    }
    fields.done(*_GPT2_NEUTRAL)
    return section


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed,
        "n_head": config.num_heads,
        "n_inner": config.mlp_size,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "n_positions": config.max_positions,
        "tie_word_embeddings": config.tied == "tied",
    }


def _gpt2_rules(config: DecoderConfig) -> list[Rule]:
    embed, mlp, heads = (config.embed,), (config.mlp_size,), (config.num_heads, config.head_size)
    names = ("query", "key", "value")
    block = "transformer.h.{layer}."
    joined = {
        "take": lambda tensor: tuple(tensor.reshape(*tensor.shape[:-1], 3, *heads)[..., i, :, :] for i in range(3)),
        "give": lambda q, k, v: _join((q, k, v), config.num_heads * config.head_size),
    }
    rules = [
        Rule("transformer.wte.weight", ("embed.table",), copies=_copies(config, "lm_head.weight")),
        Rule("transformer.wpe.weight", ("positions.table",)),
        Rule(block + "attn.c_attn.weight", tuple(f"blocks.attention.{n}.weight" for n in names), **joined),
        Rule(block + "attn.c_attn.bias", tuple(f"blocks.attention.{n}.bias" for n in names), **joined),
        Rule(block + "attn.c_proj.weight", ("blocks.attention.out.weight",), **straight(heads, embed)),
        Rule(block + "attn.c_proj.bias", ("blocks.attention.out.bias",)),
        Rule(block + "mlp.c_fc.weight", ("blocks.mlp.up.weight",), **straight(embed, mlp)),
        Rule(block + "mlp.c_fc.bias", ("blocks.mlp.up.bias",), **vector(mlp)),
        Rule(block + "mlp.c_proj.weight", ("blocks.mlp.down.weight",), **straight(mlp, embed)),
        Rule(block + "mlp.c_proj.bias", ("blocks.mlp.down.bias",)),
    ]
    places = {block + "ln_1": "blocks.attention_norm", block + "ln_2": "blocks.mlp_norm", "transformer.ln_f": "norm"}
    for theirs, ours in places.items():
        rules += [Rule(f"{theirs}.weight", (f"{ours}.scale",)), Rule(f"{theirs}.bias", (f"{ours}.bias",))]
    return rules + _head(config)


def _join(parts: tuple[Any, ...], size: int) -> Any:
    """[..., heads, head_dim] three times -> [..., 3 heads head_dim]"""
    return np.concatenate([part.reshape(*part.shape[:-2], size) for part in parts], axis=-1)


def _gpt2_name(name: str) -> str | None:
    """The first published files lack the prefix, and hold the causal mask as a buffer."""
    name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
    return None if name.endswith((".attn.bias", ".attn.masked_bias")) else name


def _read_llama(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.must("attention_bias", False)
    fields.must("mlp_bias", False)
    fields.must("rope_scaling", None)
    rope = Fields(fields.get("rope_parameters", None) or {}, "rope_parameters.")
    rope.must("rope_type", "default")
    section = {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "embed": fields["hidden_size"],
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields.get("num_key_value_heads", None) or fields["num_attention_heads"],
        "head_dim": fields.get("head_dim", None) or fields["hidden_size"] // fields["num_attention_heads"],
        "mlp": fields["intermediate_size"],
        "activation": fields.choice("hidden_act", {"silu": "silu"}, "silu"),
        "gated": "gated",
        "norm": "rmsnorm",
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "rope_base": float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0))),
        "max_positions": fields.get("max_position_embeddings", 2048),
        "tied": "tied" if fields.get("tie_word_embeddings", False) else "untied",
        "biases": "none",
    }
    fields.done("attention_dropout")
    rope.done()
    return section


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied == "tied",
    }


def _llama_rules(config: DecoderConfig) -> list[Rule]:
    embed, mlp, head_dim = (config.embed,), (config.mlp_size,), config.head_size
    heads, kv_heads = (config.num_heads, head_dim), (config.kv_heads, head_dim)
    maps = {
        "self_attn.q_proj": ("attention.query", embed, heads),
        "self_attn.k_proj": ("attention.key", embed, kv_heads),
        "self_attn.v_proj": ("attention.value", embed, kv_heads),
        "self_attn.o_proj": ("attention.out", heads, embed),
        "mlp.gate_proj": ("mlp.gate", embed, mlp),
        "mlp.up_proj": ("mlp.up", embed, mlp),
        "mlp.down_proj": ("mlp.down", mlp, embed),
    }
    block = "model.layers.{layer}."
    return [
        Rule("model.embed_tokens.weight", ("embed.table",), copies=_copies(config, "lm_head.weight")),
        Rule("model.norm.weight", ("norm.scale",)),
        Rule(block + "input_layernorm.weight", ("blocks.attention_norm.scale",)),
        Rule(block + "post_attention_layernorm.weight", ("blocks.mlp_norm.scale",)),
        *(
            Rule(f"{block}{theirs}.weight", (f"blocks.{ours}.weight",), **matrix(inputs, outputs))
            for theirs, (ours, inputs, outputs) in maps.items()
        ),
        *_head(config),
    ]


def _copies(config: DecoderConfig, *names: str) -> tuple[str, ...]:
    return names if config.tied == "tied" else ()


def _head(config: DecoderConfig) -> list[Rule]:
    return [] if config.tied == "tied" else [Rule("lm_head.weight", ("head",), **transposed())]


ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        read_config=_read_gpt2, write_config=_write_gpt2, rules=_gpt2_rules, rename=_gpt2_name, free=("rope_base",)
    ),
    "LlamaForCausalLM": Architecture(
        read_config=_read_llama,
        write_config=_write_llama,
        rules=_llama_rules,
        rename=lambda name: None if name.endswith("rotary_emb.inv_freq") else name,
    ),
}
