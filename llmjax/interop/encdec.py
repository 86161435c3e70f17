"""Encoder-decoder checkpoints: T5, T5 v1.1 and Flan-T5."""

from typing import Any

from llmjax.errors import UserError
from llmjax.interop.hf_config import Fields
from llmjax.interop.mapping import Architecture, Rule, linear, transposed
from llmjax.models.base import MAX_LAYERS
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
    start = fields.get("decoder_start_token_id", None, int)
    layers = fields.size("num_layers", most=MAX_LAYERS)
    for alias, name in _ALIASES.items():
        fields.require(alias, fields[name], None)
    section = {
        "vocab_size": fields["vocab_size"],
        "start_id": -1 if start is None else start,
        "num_layers": layers,
        "num_decoder_layers": fields.optional_size("num_decoder_layers", most=MAX_LAYERS) or layers,
        "embed": fields["d_model"],
        "num_heads": fields["num_heads"],
        "head_dim": fields["d_kv"],
        "mlp": fields["d_ff"],
        "activation": activation,
        "gated": gated,
        "norm_eps": fields.get("layer_norm_epsilon", 1e-6),
        "relative_buckets": fields.size("relative_attention_num_buckets", 32),
        "relative_distance": fields.size("relative_attention_max_distance", 128),
        "tie_embeddings": scaled,
    }
    fields.reject_unread("n_positions")
    return section


def _write(config: EncDecConfig) -> dict[str, Any]:
    names = [name for name, form in _FEED_FORWARD.items() if form == (config.activation, config.gated)]
    if not names:
        raise UserError(
            f"model.activation={config.activation!r} with model.gated={config.gated}: T5's feed_forward_proj cannot "
            "express it"
        )
    start = {} if config.start_id < 0 else {"decoder_start_token_id": config.start_id}
    return {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        **start,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.embed,
        "num_heads": config.num_heads,
        "d_kv": config.head_size,
        "d_ff": config.mlp_size,
        "feed_forward_proj": names[0],
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rules(config: EncDecConfig) -> list[Rule]:
    tied = config.tie_embeddings
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(("lm_head.weight",) if tied else ()))
    rules = [Rule("shared.weight", ("embed.table",), aliases=aliases)]
    rules += _stack(config, "encoder", {"SelfAttention": "attention"})
    rules += _stack(config, "decoder", {"SelfAttention": "attention", "EncDecAttention": "cross"})
    return rules if tied else [*rules, Rule("lm_head.weight", ("head",), **transposed())]


def _stack(config: EncDecConfig, side: str, attentions: dict[str, str]) -> list[Rule]:
    """The rules of the encoder or the decoder, whose blocks number their sub-blocks."""
    embed, mlp, heads = (config.embed,), (config.mlp_size,), (config.num_heads, config.head_size)
    hf_block, block = f"{side}.block.{{layer}}.layer.", f"{side}.blocks."
    rules = [
        Rule(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{side}.bias.table",)),
        Rule(f"{side}.final_layer_norm.weight", (f"{side}.norm.scale",)),
    ]
    for number, (hf_name, name) in enumerate(attentions.items()):
        maps = {"q": ("query", embed, heads), "k": ("key", embed, heads), "v": ("value", embed, heads)}
        for letter, (part, inputs, outputs) in (maps | {"o": ("out", heads, embed)}).items():
            names = (f"{block}{name}.{part}.weight",)
            rules.append(Rule(f"{hf_block}{number}.{hf_name}.{letter}.weight", names, **linear(inputs, outputs)))
        rules.append(Rule(f"{hf_block}{number}.layer_norm.weight", (f"{block}{name}_norm.scale",)))
    hf_mlp = f"{hf_block}{len(attentions)}."
    for hf_name, part in {"wi_0": "gate", "wi_1": "up"}.items() if config.gated else [("wi", "up")]:
        names = (f"{block}mlp.{part}.weight",)
        rules.append(Rule(f"{hf_mlp}DenseReluDense.{hf_name}.weight", names, **linear(embed, mlp)))
    rules.append(Rule(f"{hf_mlp}DenseReluDense.wo.weight", (f"{block}mlp.down.weight",), **linear(mlp, embed)))
    return [*rules, Rule(f"{hf_mlp}layer_norm.weight", (f"{block}mlp_norm.scale",))]


def _name(name: str) -> str | None:
    """Leave out a position bias between decoder and source, which the first published files hold and no model reads."""
    return None if name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight" else name


ARCHITECTURES = {
    "T5ForConditionalGeneration": Architecture(read_config=_read, write_config=_write, rules=_rules, rename=_name)
}
