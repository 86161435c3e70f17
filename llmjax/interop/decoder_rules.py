"""Mapping rules of decoder-only checkpoints: GPT-2's names, and those that Llama and its successors share."""

import math

import numpy as np

from llmjax.interop.mapping import Rule, conv1d, make_linear_rules, make_norm_rules, transposed, vector
from llmjax.models.decoder_config import DecoderConfig

LAYER = "model.layers.{layer}."

# norm_position -> Hugging Face name of each norm of a block -> its name here
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


def make_llama_rules(config: DecoderConfig) -> list[Rule]:
    """All rules of a decoder with Llama's tensor names, for every kind of norm, bias and query norm."""
    return make_rules_without_mlp(config) + make_mlp_rules(config)


def make_rules_without_mlp(config: DecoderConfig) -> list[Rule]:
    """The same without the feed-forward layers."""
    return make_end_rules(config) + make_block_norm_rules(config) + make_attention_rules(config)


def make_end_rules(config: DecoderConfig) -> list[Rule]:
    """The embedding, the last norm and the head."""
    return [
        Rule("model.embed_tokens.weight", ("embed.table",), aliases=head_aliases(config)),
        Rule("model.norm.weight", ("norm.scale",)),
        *make_head_rules(config),
    ]


def make_block_norm_rules(config: DecoderConfig) -> list[Rule]:
    """The norms of the blocks' residual stream."""
    names = _NORMS[config.norm_position]
    return make_norm_rules({f"{LAYER}{hf_name}": f"blocks.{name}" for hf_name, name in names.items()})


def make_attention_rules(config: DecoderConfig) -> list[Rule]:
    """Four linear maps with their biases, the norms of queries and keys, and the sinks, as the config has them."""
    embed, heads, kv_heads = (config.embed,), (config.num_heads, config.head_size), (config.kv_heads, config.head_size)
    bias = config.biases != "none"
    rules = [
        *make_linear_rules(LAYER + "self_attn.q_proj", "blocks.attention.query", embed, heads, bias),
        *make_linear_rules(LAYER + "self_attn.k_proj", "blocks.attention.key", embed, kv_heads, bias),
        *make_linear_rules(LAYER + "self_attn.v_proj", "blocks.attention.value", embed, kv_heads, bias),
        *make_linear_rules(LAYER + "self_attn.o_proj", "blocks.attention.out", heads, embed, bias),
    ]
    if config.qk_norm != "none":
        for hf_name, name, sizes in (("q_norm", "query_norm", heads), ("k_norm", "key_norm", kv_heads)):
            transform = vector(sizes) if config.qk_norm == "all" else {}
            rules.append(Rule(f"{LAYER}self_attn.{hf_name}.weight", (f"blocks.attention.{name}.scale",), **transform))
    if config.attention_sinks:
        rules.append(Rule(LAYER + "self_attn.sinks", ("blocks.attention.sinks",)))
    return rules


def make_mlp_rules(config: DecoderConfig) -> list[Rule]:
    """The gated feed-forward layer."""
    embed, width, bias = (config.embed,), (config.mlp_size,), config.biases == "all"
    return [
        *make_linear_rules(LAYER + "mlp.gate_proj", "blocks.mlp.gate", embed, width, bias),
        *make_linear_rules(LAYER + "mlp.up_proj", "blocks.mlp.up", embed, width, bias),
        *make_linear_rules(LAYER + "mlp.down_proj", "blocks.mlp.down", width, embed, bias),
    ]


def head_aliases(config: DecoderConfig) -> tuple[str, ...]:
    """Further names of the embedding, if it is also the head."""
    return ("lm_head.weight",) if config.tie_embeddings else ()


def make_head_rules(config: DecoderConfig) -> list[Rule]:
    """The head, if it is not tied."""
    return [] if config.tie_embeddings else [Rule("lm_head.weight", ("head",), **transposed())]


def make_gpt2_rules(config: DecoderConfig) -> list[Rule]:
    """All rules of GPT-2."""
    embed, width, heads = (config.embed,), (config.mlp_size,), (config.num_heads, config.head_size)
    names = ("query", "key", "value")
    block = "transformer.h.{layer}."
    fused = {
        "from_hf": lambda tensor: tuple(tensor.reshape(*tensor.shape[:-1], 3, *heads)[..., i, :, :] for i in range(3)),
        "to_hf": lambda *arrays: np.concatenate([a.reshape(*a.shape[:-2], math.prod(heads)) for a in arrays], axis=-1),
    }
    rules = [
        Rule("transformer.wte.weight", ("embed.table",), aliases=head_aliases(config)),
        Rule("transformer.wpe.weight", ("positions.table",)),
        Rule(block + "attn.c_attn.weight", tuple(f"blocks.attention.{n}.weight" for n in names), **fused),
        Rule(block + "attn.c_attn.bias", tuple(f"blocks.attention.{n}.bias" for n in names), **fused),
        Rule(block + "attn.c_proj.weight", ("blocks.attention.out.weight",), **conv1d(heads, embed)),
        Rule(block + "attn.c_proj.bias", ("blocks.attention.out.bias",)),
        Rule(block + "mlp.c_fc.weight", ("blocks.mlp.up.weight",), **conv1d(embed, width)),
        Rule(block + "mlp.c_fc.bias", ("blocks.mlp.up.bias",), **vector(width)),
        Rule(block + "mlp.c_proj.weight", ("blocks.mlp.down.weight",), **conv1d(width, embed)),
        Rule(block + "mlp.c_proj.bias", ("blocks.mlp.down.bias",)),
    ]
    norm_names = {
        f"{block}ln_1": "blocks.attention_norm",
        f"{block}ln_2": "blocks.mlp_norm",
        "transformer.ln_f": "norm",
    }
    return rules + make_norm_rules(norm_names, bias=True) + make_head_rules(config)
