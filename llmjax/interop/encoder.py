"""Encoder checkpoints: BERT and ModernBERT."""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.interop.heads import CLASSIFIER, add_variants
from llmjax.interop.hf_config import (
    COMMON_SIZES,
    FULL,
    NUMBER,
    SLIDING,
    Field,
    Fields,
    activation,
    constant,
    find_attention_pattern,
    read_fields,
    write_fields,
)
from llmjax.interop.mapping import Architecture, Rule, linear, make_linear_rules, make_norm_rules, transposed
from llmjax.models.encoder import EncoderConfig

_SIZES = (
    *COMMON_SIZES,
    Field("intermediate_size", "mlp"),
)
_BERT_FIELDS = (
    *_SIZES,
    activation("hidden_act", "gelu"),
    Field("layer_norm_eps", "norm_eps", Fields.get, 1e-12),
    Field("max_position_embeddings", "max_positions", Fields.size, 512),
    Field("type_vocab_size", "token_types", Fields.optional_size, 2),
    constant("position_embedding_type", "absolute"),
    constant("tie_word_embeddings", True),
)
_MODERNBERT = (
    *_SIZES,
    activation("hidden_activation", "gelu"),
    activation("classifier_activation", "gelu"),
    Field("norm_eps", "norm_eps", Fields.get, 1e-5),
    constant("norm_bias", False),
    constant("attention_bias", False),
    constant("mlp_bias", False),
    constant("classifier_bias", False),
    constant("decoder_bias", True),
    Field("max_position_embeddings", "max_positions", Fields.size, 8192),
)
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
    section = read_fields(_BERT_FIELDS, fields)
    fields.reject_unread(*_BERT_NEUTRAL)
    return section | {"gated": False, "norm_position": "post", "positions": "learned", "biases": "all"}


def _write_bert(config: EncoderConfig) -> dict[str, Any]:
    if not config.token_types:
        raise UserError(
            "model.token_types=0: a BERT checkpoint has at least one token type; train with model.token_types=1 or 2"
        )
    return {"model_type": "bert", **write_fields(_BERT_FIELDS, config)}


def _make_bert_rules(config: EncoderConfig) -> list[Rule]:
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
    if config.pooler:
        linears["bert.pooler.dense"] = ("pooler", embed, embed)
    for hf_name, (name, inputs, outputs) in linears.items():
        rules += make_linear_rules(hf_name, name, inputs, outputs, bias=True)
    return rules + make_norm_rules(norms, bias=True)


def _rename_bert(name: str) -> str | None:
    """Leave out a buffer of positions. The first published files name a norm's parameters gamma and beta."""
    if name.endswith(".position_ids"):
        return None
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _read_modernbert(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("tie_word_embeddings", True)
    section = read_fields(_MODERNBERT, fields)
    if fields.activation("hidden_activation", "gelu") != fields.activation("classifier_activation", "gelu"):
        raise UserError(
            f"config.json: classifier_activation={hf.get('classifier_activation')!r} is not supported with "
            f"hidden_activation={hf.get('hidden_activation')!r}: head and blocks must have the same activation"
        )
    layers, period = section["num_layers"], fields.size("global_attn_every_n_layers", 3)
    types = fields.layer_types(layers) or [SLIDING if layer % period else FULL for layer in range(layers)]
    section |= {
        "gated": True,
        "norm_position": "pre",
        "positions": "rotary",
        "rope_base": _read_rope_base(fields, FULL, "global_rope_theta", 160_000.0),
        "token_types": 0,
        "biases": "none",
    }
    local_base = _read_rope_base(fields, SLIDING, "local_rope_theta", 10_000.0)
    # local_attention counts the positions on both sides that a token attends to; window is the first distance at which
    # it attends to nothing.
    window = fields.size("local_attention", 128) // 2 + 1
    fields.reject_unread(*_MODERNBERT_NEUTRAL)
    local = {"window": window, "attention_pattern": find_attention_pattern(types), "rope_local_base": local_base}
    return section | (local if SLIDING in types else {})


def _read_rope_base(fields: Fields, kind: str, old_name: str, default: float) -> float:
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
    return {
        "model_type": "modernbert",
        **write_fields(_MODERNBERT, config),
        # For older releases, which have no layer_types: every n-th layer is global, from the first one on.
        "global_attn_every_n_layers": kinds[1:].index(FULL) + 1 if FULL in kinds[1:] else len(kinds),
        "layer_types": kinds,
        "local_attention": 2 * (config.window - 1) if config.window else 128,
        "global_rope_theta": bases[FULL],
        "local_rope_theta": bases[SLIDING],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        "tie_word_embeddings": True,
    }


def _make_modernbert_rules(config: EncoderConfig) -> list[Rule]:
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


_BERT = Architecture(
    _read_bert,
    _write_bert,
    _make_bert_rules,
    _rename_bert,
    unused_fields=("rope_base", "pooler"),  # only the parameters show whether there is a pooler
    shown_by={"pooler": "bert.pooler.dense.weight"},
)
ARCHITECTURES = {
    **add_variants({"BertForMaskedLM": _BERT}, "BertForMaskedLM", "Bert", "bert.", ("cls.",), CLASSIFIER),
    # Published files of this class have the pooler and the head of BertForPreTraining, which it does not read.
    "BertForMaskedLM": dataclasses.replace(
        _BERT, shown_by={}, missing=("bert.pooler.",), left_out=("bert.pooler.", "cls.seq_relationship.")
    ),
    "BertForPreTraining": dataclasses.replace(
        _BERT, base="BertForMaskedLM", left_out=("cls.seq_relationship.",), exported_as="BertForMaskedLM"
    ),
    "ModernBertForMaskedLM": Architecture(_read_modernbert, _write_modernbert, _make_modernbert_rules),
}
ARCHITECTURES = add_variants(
    ARCHITECTURES, "ModernBertForMaskedLM", "ModernBert", "model.", ("head.", "decoder."), task_head=None
)
# These two have the dense layer and the norm of the head for masked LM, too.
for _name in ("ModernBertForSequenceClassification", "ModernBertForTokenClassification"):
    ARCHITECTURES[_name] = dataclasses.replace(ARCHITECTURES[_name], missing=("decoder.",))
