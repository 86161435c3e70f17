"""Mapping rules of decoder-only checkpoints: GPT-2's names, and those that Llama and its successors share."""

from typing import Any

import numpy as np

from llmjax.interop.mapping import Rule, matrix, straight, transposed, vector
from llmjax.models.decoder_config import DecoderConfig

LAYER = "model.layers.{layer}."

# norm_position -> name on disk of each of a block's norms
_NORMS = {
    "pre": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "inner": {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"},
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
}


def llama(config: DecoderConfig) -> list[Rule]:
    """All rules of a decoder with the names of Llama, whatever norms, biases and queries it has."""
    return ends(config) + norms(config) + attention(config) + mlp(config)


def ends(config: DecoderConfig) -> list[Rule]:
    """The embedding, the last norm and the head."""
    return [
        Rule("model.embed_tokens.weight", ("embed.table",), copies=copies(config)),
        Rule("model.norm.weight", ("norm.scale",)),
        *head(config),
    ]


def norms(config: DecoderConfig) -> list[Rule]:
    """The norms of the blocks' residual stream."""
    names = _NORMS[config.norm_position]
    return [Rule(f"{LAYER}{theirs}.weight", (f"blocks.{ours}.scale",)) for theirs, ours in names.items()]


def attention(config: DecoderConfig) -> list[Rule]:
    """Four linear maps, and what a config adds to them: biases, norms of queries and keys, sinks."""
    embed, heads, kv_heads = (config.embed,), (config.num_heads, config.head_size), (config.kv_heads, config.head_size)
    bias = config.biases != "none"
    rules = [
        *_linear("self_attn.q_proj", "attention.query", embed, heads, bias),
        *_linear("self_attn.k_proj", "attention.key", embed, kv_heads, bias),
        *_linear("self_attn.v_proj", "attention.value", embed, kv_heads, bias),
        *_linear("self_attn.o_proj", "attention.out", heads, embed, bias),
    ]
    if config.qk_norm != "none":
        for theirs, ours, sizes in (("q_norm", "query_norm", heads), ("k_norm", "key_norm", kv_heads)):
            layout = vector(sizes) if config.qk_norm == "all" else {}
            rules.append(Rule(f"{LAYER}self_attn.{theirs}.weight", (f"blocks.attention.{ours}.scale",), **layout))
    if config.attention_sinks:
        rules.append(Rule(LAYER + "self_attn.sinks", ("blocks.attention.sinks",)))
    return rules


def mlp(config: DecoderConfig) -> list[Rule]:
    """The gated feed-forward layer."""
    embed, width, bias = (config.embed,), (config.mlp_size,), config.biases == "all"
    return [
        *_linear("mlp.gate_proj", "mlp.gate", embed, width, bias),
        *_linear("mlp.up_proj", "mlp.up", embed, width, bias),
        *_linear("mlp.down_proj", "mlp.down", width, embed, bias),
    ]


def copies(config: DecoderConfig) -> tuple[str, ...]:
    """Where the embedding may lie a second time."""
    return ("lm_head.weight",) if config.tie_embeddings else ()


def head(config: DecoderConfig) -> list[Rule]:
    """The head, where it is not tied."""
    return [] if config.tie_embeddings else [Rule("lm_head.weight", ("head",), **transposed())]


def gpt2(config: DecoderConfig) -> list[Rule]:
    """All rules of GPT-2."""
    embed, width, heads = (config.embed,), (config.mlp_size,), (config.num_heads, config.head_size)
    names = ("query", "key", "value")
    block = "transformer.h.{layer}."
    joined = {
        "from_hf": lambda tensor: tuple(tensor.reshape(*tensor.shape[:-1], 3, *heads)[..., i, :, :] for i in range(3)),
        "to_hf": lambda q, k, v: _join((q, k, v), config.num_heads * config.head_size),
    }
    rules = [
        Rule("transformer.wte.weight", ("embed.table",), copies=copies(config)),
        Rule("transformer.wpe.weight", ("positions.table",)),
        Rule(block + "attn.c_attn.weight", tuple(f"blocks.attention.{n}.weight" for n in names), **joined),
        Rule(block + "attn.c_attn.bias", tuple(f"blocks.attention.{n}.bias" for n in names), **joined),
        Rule(block + "attn.c_proj.weight", ("blocks.attention.out.weight",), **straight(heads, embed)),
        Rule(block + "attn.c_proj.bias", ("blocks.attention.out.bias",)),
        Rule(block + "mlp.c_fc.weight", ("blocks.mlp.up.weight",), **straight(embed, width)),
        Rule(block + "mlp.c_fc.bias", ("blocks.mlp.up.bias",), **vector(width)),
        Rule(block + "mlp.c_proj.weight", ("blocks.mlp.down.weight",), **straight(width, embed)),
        Rule(block + "mlp.c_proj.bias", ("blocks.mlp.down.bias",)),
    ]
    places = {block + "ln_1": "blocks.attention_norm", block + "ln_2": "blocks.mlp_norm", "transformer.ln_f": "norm"}
    for theirs, ours in places.items():
        rules += [Rule(f"{theirs}.weight", (f"{ours}.scale",)), Rule(f"{theirs}.bias", (f"{ours}.bias",))]
    return rules + head(config)


def _linear(theirs: str, ours: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool) -> list[Rule]:
    weight = Rule(f"{LAYER}{theirs}.weight", (f"blocks.{ours}.weight",), **matrix(inputs, outputs))
    return [weight, Rule(f"{LAYER}{theirs}.bias", (f"blocks.{ours}.bias",), **vector(outputs))] if bias else [weight]


def _join(parts: tuple[Any, ...], size: int) -> Any:
    """[..., heads, head_dim] three times -> [..., 3 heads head_dim]"""
    return np.concatenate([part.reshape(*part.shape[:-2], size) for part in parts], axis=-1)
