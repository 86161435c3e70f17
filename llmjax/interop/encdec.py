"""Encoder-decoder checkpoints: T5, T5 v1.1 and Flan-T5."""

import dataclasses
from typing import Any

from llmjax.errors import UserError
from llmjax.interop.hf_config import Field, Fields, read_fields, write_fields
from llmjax.interop.mapping import Architecture, Rule, make_linear_rules, make_norm_rules, transposed
from llmjax.models.encdec import EncDecConfig

# feed_forward_proj -> activation, gated; "gated-gelu" has always meant the tanh form.
_FEED_FORWARD = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
    "gated-gelu_new": ("gelu_tanh", True),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
}
_ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
}
_ACTIVATIONS = {"relu": ("relu",), "gelu": ("gelu",), "gelu_tanh": ("gelu_new",), "silu": ("silu", "swish")}


def _read_start_id(fields: Fields, name: str, _: None) -> int:
    token_id = fields.get(name, None, int)
    return -1 if token_id is None else token_id


def _write_start_id(token_id: int) -> int | None:
    return None if token_id < 0 else token_id


_SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("decoder_start_token_id", "start_id", _read_start_id, None, _write_start_id),
    Field("num_layers", "num_layers"),
    Field("num_decoder_layers", "num_decoder_layers", Fields.optional_size, 0),
    Field("d_model", "embed"),
    Field("num_heads", "num_heads"),
    Field("d_kv", "head_dim"),
    Field("d_ff", "mlp"),
)
_NUMBERS = (
    Field("layer_norm_epsilon", "norm_eps", Fields.get, 1e-6),
    Field("relative_attention_num_buckets", "relative_buckets", Fields.size, 32),
    Field("relative_attention_max_distance", "relative_distance", Fields.size, 128),
)


def _read(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("is_decoder", False)
    feed_forward = fields.choice("feed_forward_proj", {name: name for name in _FEED_FORWARD}, "relu")
    activation, gated = _FEED_FORWARD[feed_forward]
    fields.require("is_gated_act", gated)
    fields.require("dense_act_fn", *_ACTIVATIONS[activation])
    # In all published checkpoints hidden states are unscaled exactly if the head is not tied. transformers 5 writes
    # whether they are scaled, and that the head is tied even if it is not.
    tied = fields.get("tie_word_embeddings", True)
    scaled = fields.get("scale_decoder_outputs", tied)
    if scaled and not tied:
        raise UserError("config.json: scale_decoder_outputs=True is not supported with tie_word_embeddings=False")
    section = read_fields(_SIZES + _NUMBERS, fields)
    section["num_decoder_layers"] = section["num_decoder_layers"] or section["num_layers"]
    for alias, name in _ALIASES.items():
        fields.require(alias, fields[name], None)
    fields.reject_unread("n_positions")
    return section | {"activation": activation, "gated": gated, "tie_embeddings": scaled}


def _write(config: EncDecConfig) -> dict[str, Any]:
    names = [name for name, form in _FEED_FORWARD.items() if form == (config.activation, config.gated)]
    if not names:
        raise UserError(
            f"model.activation={config.activation!r} with model.gated={config.gated}: T5's feed_forward_proj cannot "
            "express it"
        )
    hf = {"model_type": "t5", "is_encoder_decoder": True, **write_fields(_SIZES, config), "feed_forward_proj": names[0]}
    hf |= {**write_fields(_NUMBERS, config), "tie_word_embeddings": config.tie_embeddings}
    return {name: value for name, value in hf.items() if value is not None}  # the start id may be unknown


def _make_rules(config: EncDecConfig) -> list[Rule]:
    tied = config.tie_embeddings
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(("lm_head.weight",) if tied else ()))
    rules = [Rule("shared.weight", ("embed.table",), aliases=aliases)]
    rules += _make_stack_rules(config, "encoder", {"SelfAttention": "attention"})
    rules += _make_stack_rules(config, "decoder", {"SelfAttention": "attention", "EncDecAttention": "cross"})
    return rules if tied else [*rules, Rule("lm_head.weight", ("head",), **transposed())]


def _make_stack_rules(config: EncDecConfig, side: str, attentions: dict[str, str]) -> list[Rule]:
    """The rules of the encoder or the decoder, whose blocks number their sub-blocks."""
    embed, mlp, heads = (config.embed,), (config.mlp_size,), (config.num_heads, config.head_size)
    hf_block, block = f"{side}.block.{{layer}}.layer.", f"{side}.blocks."
    rules = [
        Rule(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{side}.bias.table",)),
        *make_norm_rules({f"{side}.final_layer_norm": f"{side}.norm"}),
    ]
    linears = {"q": ("query", embed, heads), "k": ("key", embed, heads), "v": ("value", embed, heads)}
    linears |= {"o": ("out", heads, embed)}
    for number, (hf_name, name) in enumerate(attentions.items()):
        for letter, (part, *sizes) in linears.items():
            rules += make_linear_rules(
                f"{hf_block}{number}.{hf_name}.{letter}", f"{block}{name}.{part}", *sizes, bias=False
            )
        rules += make_norm_rules({f"{hf_block}{number}.layer_norm": f"{block}{name}_norm"})
    hf_mlp = f"{hf_block}{len(attentions)}."
    for hf_name, part in {"wi_0": "gate", "wi_1": "up"}.items() if config.gated else [("wi", "up")]:
        rules += make_linear_rules(f"{hf_mlp}DenseReluDense.{hf_name}", f"{block}mlp.{part}", embed, mlp, bias=False)
    rules += make_linear_rules(f"{hf_mlp}DenseReluDense.wo", f"{block}mlp.down", mlp, embed, bias=False)
    return rules + make_norm_rules({f"{hf_mlp}layer_norm": f"{block}mlp_norm"})


def _rename_t5(name: str) -> str | None:
    """Leave out a position bias between decoder and source, which the first published files hold and no model reads."""
    return None if name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight" else name


_T5 = Architecture(_read, _write, _make_rules, _rename_t5)
_WITHOUT_HEAD = dataclasses.replace(_T5, base="T5ForConditionalGeneration", missing=("lm_head.",))
ARCHITECTURES = {
    "T5ForConditionalGeneration": _T5,
    "T5Model": _WITHOUT_HEAD,
    "T5EncoderModel": dataclasses.replace(
        _WITHOUT_HEAD,
        write_config=lambda config: _write(config) | {"is_encoder_decoder": False},
        missing=("lm_head.", "decoder."),
        unused_fields=("tie_embeddings",),
    ),
}
