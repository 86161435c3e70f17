"""Encoder checkpoints: BERT and ModernBERT with their masked-LM heads."""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.interop.hf_config import FULL, NUMBER, SLIDING, Fields, attention_pattern
from llmjax.interop.mapping import Architecture, Rule, linear, transposed, vector
from llmjax.models.base import MAX_LAYERS
from llmjax.models.encoder import EncoderConfig

# If several Hugging Face names mean the same function, the last one is written.
_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
}
_HF_ACTIVATIONS = {name: hf_name for hf_name, name in _ACTIVATIONS.items()}
_BERT_NEUTRAL = """
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
""".split()  # noqa: SIM905
_MODERNBERT_NEUTRAL = """
    classifier_pooling deterministic_flash_attn layer_norm_eps position_embedding_type reference_compile
    repad_logits_with_grad sparse_prediction sparse_pred_ignore_index
""".split()  # noqa: SIM905


def _read_bert(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("is_decoder", False)
    fields.require("add_cross_attention", False)
    fields.require("position_embedding_type", "absolute")
    fields.require("tie_word_embeddings", True)
    section = {
        "family": "encoder",
        "vocab_size": fields["vocab_size"],
        "num_layers": fields.size("num_hidden_layers", most=MAX_LAYERS),
        "embed": fields["hidden_size"],
        "num_heads": fields["num_attention_heads"],
        "mlp": fields["intermediate_size"],
        "activation": fields.choice("hidden_act", _ACTIVATIONS, "gelu"),
        "gated": False,
        "norm_eps": fields.get("layer_norm_eps", 1e-12),
        "norm_position": "post",
        "positions": "learned",
        "max_positions": fields.size("max_position_embeddings", 512),
        "token_types": fields.optional_size("type_vocab_size", 2),
        "biases": "all",
    }
    fields.reject_unread(*_BERT_NEUTRAL)
    return section


def _write_bert(config: EncoderConfig) -> dict[str, Any]:
    if not config.token_types:
        raise UserError(
            "model.token_types=0: a BERT checkpoint has at least one token type; train with model.token_types=1 or 2"
        )
    return {
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "hidden_act": _HF_ACTIVATIONS.get(config.activation, config.activation),
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


def _bert_rules(config: EncoderConfig) -> list[Rule]:
    embed, mlp, heads = (config.embed,), (config.mlp_size,), (config.num_heads, config.head_size)
    layer, head = "bert.encoder.layer.{layer}.", "cls.predictions."
    linears = {
        layer + "attention.self.query": ("blocks.attention.query", embed, heads),
        layer + "attention.self.key": ("blocks.attention.key", embed, heads),
        layer + "attention.self.value": ("blocks.attention.value", embed, heads),
        layer + "attention.output.dense": ("blocks.attention.out", heads, embed),
        layer + "intermediate.dense": ("blocks.mlp.up", embed, mlp),
        layer + "output.dense": ("blocks.mlp.down", mlp, embed),
        head + "transform.dense": ("head.dense", embed, embed),
    }
    norms = {
        "bert.embeddings.LayerNorm": "embed_norm",
        layer + "attention.output.LayerNorm": "blocks.attention_norm",
        layer + "output.LayerNorm": "blocks.mlp_norm",
        head + "transform.LayerNorm": "head.norm",
    }
    rules = [
        Rule("bert.embeddings.word_embeddings.weight", ("embed.table",), aliases=(head + "decoder.weight",)),
        Rule("bert.embeddings.position_embeddings.weight", ("positions.table",)),
        Rule("bert.embeddings.token_type_embeddings.weight", ("token_types.table",)),
        Rule(head + "bias", ("head.bias",), aliases=(head + "decoder.bias",)),
    ]
    for hf_name, (name, inputs, outputs) in linears.items():
        rules.append(Rule(f"{hf_name}.weight", (f"{name}.weight",), **linear(inputs, outputs)))
        rules.append(Rule(f"{hf_name}.bias", (f"{name}.bias",), **vector(outputs)))
    for hf_name, name in norms.items():
        rules += [Rule(f"{hf_name}.weight", (f"{name}.scale",)), Rule(f"{hf_name}.bias", (f"{name}.bias",))]
    return rules


def _bert_name(name: str) -> str | None:
    """The name in BertForMaskedLM, which has no pooler, head of next-sentence prediction, or buffer of positions.

    The first published files name a norm's parameters gamma and beta.
    """
    if name.startswith(("bert.pooler.", "cls.seq_relationship.")) or name.endswith(".position_ids"):
        return None
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _refuse_pretraining(_: Any) -> dict[str, Any]:
    raise UserError(
        "config.json: architecture BertForPreTraining has a head of next-sentence prediction "
        "(cls.seq_relationship.weight and .bias), which is not supported: save it as BertForMaskedLM first, which "
        "drops that head and the pooler"
    )


def _read_modernbert(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"):
        fields.require(name, False)
    fields.require("decoder_bias", True)
    fields.require("tie_word_embeddings", True)
    activation = fields.choice("hidden_activation", _ACTIVATIONS, "gelu")
    if fields.choice("classifier_activation", _ACTIVATIONS, "gelu") != activation:
        raise UserError(
            f"config.json: classifier_activation={hf.get('classifier_activation')!r} is not supported with "
            f"hidden_activation={hf.get('hidden_activation')!r}: head and blocks must have the same activation"
        )
    layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
    period = fields.size("global_attn_every_n_layers", 3)
    types = fields.layer_types(layers) or [SLIDING if layer % period else FULL for layer in range(layers)]
    base = _rope_base(fields, FULL, "global_rope_theta", 160_000.0)
    local_base = _rope_base(fields, SLIDING, "local_rope_theta", 10_000.0)
    # local_attention counts the positions on both sides that a token attends to; window is the first distance at which
    # it attends to nothing.
    window = fields.size("local_attention", 128) // 2 + 1
    local = {"window": window, "attention_pattern": attention_pattern(types), "rope_local_base": local_base}
    section = {
        "family": "encoder",
        "vocab_size": fields["vocab_size"],
        "num_layers": layers,
        "embed": fields["hidden_size"],
        "num_heads": fields["num_attention_heads"],
        "mlp": fields["intermediate_size"],
        "activation": activation,
        "gated": True,
        "norm_eps": fields.get("norm_eps", 1e-5),
        "norm_position": "pre",
        "positions": "rotary",
        "max_positions": fields.size("max_position_embeddings", 8192),
        "rope_base": base,
        "token_types": 0,
        "biases": "none",
    }
    fields.reject_unread(*_MODERNBERT_NEUTRAL)
    return section | (local if SLIDING in types else {})


def _rope_base(fields: Fields, kind: str, old_name: str, default: float) -> float:
    where = f"rope_parameters.{kind}."
    rope = Fields(Fields(fields.section("rope_parameters"), "rope_parameters.").section(kind), where)
    rope.require("rope_type", "default")
    old_value = fields.get(old_name, None, *NUMBER)
    base = rope.get("rope_theta", None, *NUMBER) or old_value or default
    rope.reject_unread()
    return float(base)


def _write_modernbert(config: EncoderConfig) -> dict[str, Any]:
    kinds = [SLIDING if local else FULL for local in config.local_layers]
    bases = {FULL: config.rope_base, SLIDING: config.rope_local_base or config.rope_base}
    activation = _HF_ACTIVATIONS.get(config.activation, config.activation)
    return {
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "hidden_activation": activation,
        "classifier_activation": activation,
        "norm_eps": config.norm_eps,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "max_position_embeddings": config.max_positions,
        # For older releases, which have no layer_types: every n-th layer is global, from the first one on.
        "global_attn_every_n_layers": kinds[1:].index(FULL) + 1 if FULL in kinds[1:] else len(kinds),
        "layer_types": kinds,
        "local_attention": 2 * (config.window - 1) if config.window else 128,
        "global_rope_theta": bases[FULL],
        "local_rope_theta": bases[SLIDING],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        "tie_word_embeddings": True,
    }


def _modernbert_rules(config: EncoderConfig) -> list[Rule]:
    embed, mlp, heads = (config.embed,), (config.mlp_size,), (config.num_heads, config.head_size)
    rules = [
        Rule("model.embeddings.tok_embeddings.weight", ("embed.table",), aliases=("decoder.weight",)),
        Rule("model.embeddings.norm.weight", ("embed_norm.scale",)),
        Rule("model.final_norm.weight", ("norm.scale",)),
        Rule("head.dense.weight", ("head.dense.weight",), **transposed()),
        Rule("head.norm.weight", ("head.norm.scale",)),
        Rule("decoder.bias", ("head.bias",)),
    ]
    layer, last = "model.layers.{layer}.", config.num_layers
    for stack, numbers in (("first", range(1)), ("blocks", range(1, last))):
        if not numbers:
            continue
        names = lambda *suffixes, stack=stack: tuple(f"{stack}.{suffix}" for suffix in suffixes)
        query_key_value = names("attention.query.weight", "attention.key.weight", "attention.value.weight")
        layer_rules = [
            Rule(layer + "attn.Wqkv.weight", query_key_value, **_fused_linears(embed, heads, 3)),
            Rule(layer + "attn.Wo.weight", names("attention.out.weight"), **linear(heads, embed)),
            Rule(layer + "mlp_norm.weight", names("mlp_norm.scale")),
            Rule(layer + "mlp.Wi.weight", names("mlp.gate.weight", "mlp.up.weight"), **_fused_linears(embed, mlp, 2)),
            Rule(layer + "mlp.Wo.weight", names("mlp.down.weight"), **linear(mlp, embed)),
        ]
        if stack == "blocks":
            layer_rules.append(Rule(layer + "attn_norm.weight", names("attention_norm.scale")))
        rules += [dataclasses.replace(rule, layers=numbers) for rule in layer_rules]
    return rules


def _fused_linears(inputs: Sequence[int], outputs: Sequence[int], count: int) -> dict[str, Any]:
    """`count` of torch's Linear with equal sizes, concatenated along the outputs."""
    one = linear(inputs, outputs)
    size = math.prod(outputs)
    return {
        "from_hf": lambda tensor: tuple(one["from_hf"](tensor[i * size : (i + 1) * size])[0] for i in range(count)),
        "to_hf": lambda *arrays: np.concatenate([one["to_hf"](array) for array in arrays]),
    }


ARCHITECTURES = {
    "BertForPreTraining": Architecture(
        read_config=_refuse_pretraining, write_config=_refuse_pretraining, rules=_bert_rules, rename=_bert_name
    ),
    "BertForMaskedLM": Architecture(
        read_config=_read_bert,
        write_config=_write_bert,
        rules=_bert_rules,
        rename=_bert_name,
        unused_fields=("rope_base",),
    ),
    "ModernBertForMaskedLM": Architecture(
        read_config=_read_modernbert, write_config=_write_modernbert, rules=_modernbert_rules
    ),
}
