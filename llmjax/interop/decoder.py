"""Decoder-only checkpoints: GPT-2, Llama, Mistral, Qwen3, Gemma 2 and 3, OLMo 2 and 3."""

from collections.abc import Sequence
import functools
from typing import Any

from llmjax.errors import UserError
from llmjax.interop import decoder_rules, heads
from llmjax.interop.hf_config import (
    COMMON_SIZES,
    FULL,
    NUMBER,
    SLIDING,
    Field,
    Fields,
    activation,
    find_attention_pattern,
    read_fields,
    write_fields,
)
from llmjax.interop.hf_rope import read_rope, read_rope_by_kind, write_rope, write_rope_by_kind
from llmjax.interop.mapping import Architecture
from llmjax.models.decoder_config import DecoderConfig

_GEMMA3_IMAGES = """
    boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id image_token_id mm_tokens_per_image
    vision_config
""".split()  # noqa: SIM905
_GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_GPT2_NEUTRAL = """
    n_ctx n_special predict_special_tokens summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout
""".split()  # noqa: SIM905

_GPT2 = (
    Field("vocab_size", "vocab_size"),
    Field("n_layer", "num_layers"),
    Field("n_embd", "embed"),
    Field("n_head", "num_heads"),
    Field("n_inner", "mlp", Fields.optional_size, 0),
    activation("activation_function", "gelu_new"),
    Field("layer_norm_epsilon", "norm_eps", Fields.get, 1e-5),
    Field("n_positions", "max_positions"),
    Field("tie_word_embeddings", "tie_embeddings", Fields.get, True),
)
# The fields that all successors of Llama share, without their activation and rotary frequencies.
SHARED = (
    *COMMON_SIZES,
    Field("num_key_value_heads", "num_kv_heads", Fields.optional_size, 0),
    Field("head_dim", "head_dim", Fields.optional_size, 0),
    Field("intermediate_size", "mlp"),
    Field("rms_norm_eps", "norm_eps", Fields.get, 1e-6),
    Field("max_position_embeddings", "max_positions", Fields.size, 2048),
    Field("tie_word_embeddings", "tie_embeddings", Fields.get, False),
)
LLAMA_ACTIVATION = (activation("hidden_act", "silu", gelu_tanh="gelu_pytorch_tanh"),)
_GEMMA_ACTIVATION = (activation("hidden_activation", "gelu_pytorch_tanh", gelu_tanh="gelu_pytorch_tanh"),)


def _read_gpt2(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("scale_attn_weights", True)
    fields.require("scale_attn_by_inverse_layer_idx", False)
    # The same formula in another order, for half precision.
    fields.require("reorder_and_upcast_attn", False)
    fields.require("add_cross_attention", False)
    for alias, name in _GPT2_ALIASES.items():
        fields.require(alias, fields[name], None)
    section = read_fields(_GPT2, fields)
    section |= {"mlp": section["mlp"] or 4 * section["embed"], "gated": False, "norm": "layernorm"}
    fields.reject_unread(*_GPT2_NEUTRAL)
    return section | {"positions": "learned", "biases": "all"}


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {"model_type": "gpt2", **write_fields(_GPT2, config)}


def _rename_gpt2(name: str) -> str | None:
    """Add the prefix that the first published files lack, and leave out their causal masks."""
    name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
    return None if name.endswith((".attn.bias", ".attn.masked_bias")) else name


def read_shared(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The fields of section `model` for SHARED and attention_bias; `defaults` as in `read_fields`."""
    section = read_fields(SHARED, fields, **defaults)
    section["num_kv_heads"] = section["num_kv_heads"] or section["num_heads"]
    section["head_dim"] = section["head_dim"] or section["embed"] // section["num_heads"]
    biases = "attention" if fields.get("attention_bias", False) else "none"
    return section | {"gated": True, "norm": "rmsnorm", "positions": "rotary", "biases": biases}


def read_llama_fields(fields: Fields, *, rope_base: float = 10_000.0, **defaults: Any) -> dict[str, Any]:
    """The same fields, the activation, and rotary frequencies that are equal in all layers."""
    section = read_shared(fields, **defaults) | read_fields(LLAMA_ACTIVATION, fields)
    return section | read_rope(fields, base=rope_base, max_length=section["max_positions"])


def _write_shared(config: DecoderConfig, model_type: str, activation: Sequence[Field]) -> dict[str, Any]:
    shared = {"model_type": model_type, **write_fields(SHARED, config), "attention_bias": config.biases != "none"}
    return shared | write_fields(activation, config)


def _write_llama_fields(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    return _write_shared(config, model_type, LLAMA_ACTIVATION) | write_rope(config)


def read_local_layers(fields: Fields, *, default: list[str], window: int = 4096) -> dict[str, Any]:
    """The fields window and attention_pattern of section `model`, from sliding_window and layer_types.

    `default` stands for an absent layer_types, `window` for an absent sliding_window.
    """
    types = fields.layer_types(fields["num_hidden_layers"]) or default
    size = fields.optional_size("sliding_window", window)
    if SLIDING not in types:
        return {}
    if not size:
        raise UserError(f"config.json: sliding_window={size or None}: expected a number, as layer_types has {SLIDING}")
    return {"window": size, "attention_pattern": find_attention_pattern(types)}


def write_local_layers(config: DecoderConfig, unused_window: int | None = 4096) -> dict[str, Any]:
    """The part of config.json that `read_local_layers` reads.

    `unused_window` is written if no layer is local: most classes make the mask of local layers in any case.
    """
    types = [SLIDING if local else FULL for local in config.local_layers]
    return {"sliding_window": config.window or unused_window, "layer_types": types}


def list_layer_types(num_layers: int, n: int) -> list[str]:
    """layer_types of a model whose every n-th layer is global, the n-th as the first."""
    return [SLIDING if (layer + 1) % n else FULL for layer in range(num_layers)]


def _drop_unused_base(section: dict[str, Any]) -> dict[str, Any]:
    """The section without rope_local_base if no layer is local."""
    return {name: value for name, value in section.items() if name != "rope_local_base" or "window" in section}


def _read_llama(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    section = read_llama_fields(fields)
    if section["biases"] == "none":
        fields.require("mlp_bias", False)
    elif fields.get("mlp_bias", False):
        section["biases"] = "all"
    # Fields of SmolLM2 and of the first Llama, which the reference does not read.
    fields.require("is_llama_config", True)
    fields.require("rope_interleaved", False)
    fields.reject_unread("max_sequence_length", "model_max_length")
    return section


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return _write_llama_fields(config, "llama") | {"mlp_bias": config.biases == "all"}


def _read_mistral(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(hf)
    fields.require("attention_bias", False)
    section = read_llama_fields(fields, num_key_value_heads=8, max_position_embeddings=4096 * 32)
    window = fields.optional_size("sliding_window", 4096)
    fields.reject_unread()
    return section | ({"window": window, "attention_pattern": "l"} if window else {})


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    shared = _write_llama_fields(config, "mistral")
    if not shared.pop("attention_bias"):
        return shared | {"sliding_window": config.window or None}
    raise UserError(f"model.biases={config.biases!r}: a checkpoint of MistralForCausalLM has none")


def _read_qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    fields = Fields({"head_dim": 128} | hf)
    section = read_llama_fields(fields, num_key_value_heads=32, max_position_embeddings=32768)
    section |= {"qk_norm": "head"}
    slides, full = fields.get("use_sliding_window", False), fields.optional_size("max_window_layers", 28)
    types = [SLIDING if slides and layer >= full else FULL for layer in range(section["num_layers"])]
    section |= read_local_layers(fields, default=types)
    fields.reject_unread()
    return section


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    shared = _write_llama_fields(config, "qwen3")
    return shared | write_local_layers(config, unused_window=None) | {"use_sliding_window": bool(config.window)}


def _read_gemma(hf: dict[str, Any], *, model_type: str) -> dict[str, Any]:
    is_gemma3 = model_type == "gemma3_text"
    fields = Fields({"head_dim": 256} | hf)
    defaults = {"max_position_embeddings": 131_072 if is_gemma3 else 8192, "tie_word_embeddings": True}
    section = read_shared(fields, num_key_value_heads=4, **defaults)
    # Published files also have hidden_act, which the reference does not read.
    section |= read_fields(_GEMMA_ACTIVATION, fields)
    fields.require("use_bidirectional_attention", False, None)
    max_length = section["max_positions"]
    scale = fields.positive("query_pre_attn_scalar", 256)
    section |= {
        "norm": "rmsnorm1p",
        "norm_position": "both",
        "embed_multiplier": section["embed"] ** 0.5,
        "score_scale": 0.0 if scale == section["head_dim"] else scale**-0.5,
        "logit_softcap": fields.get("final_logit_softcapping", None if is_gemma3 else 30.0, *NUMBER) or 0.0,
    }
    if is_gemma3:
        # A field of the class that its attention does not pass on: the reference caps nothing.
        fields.require("attn_logit_softcapping", None)
        new, old = (fields.optional_size(name) for name in ("_sliding_window_pattern", "sliding_window_pattern"))
        period = new or old or 6
        section |= {"qk_norm": "head"} | read_local_layers(
            fields, default=list_layer_types(section["num_layers"], period)
        )
        section |= read_rope_by_kind(
            fields, base=1e6, max_length=max_length, local_base=1e4, old_local="rope_local_base_freq"
        )
    else:
        section |= {"score_softcap": fields.get("attn_logit_softcapping", 50.0) or 0.0}
        fields.require("sliding_window_size", fields.optional_size("sliding_window", 4096), None)
        section |= read_local_layers(fields, default=list_layer_types(section["num_layers"], 2))
        section |= read_rope(fields, base=10_000.0, max_length=max_length)
    fields.reject_unread("hidden_act", "sliding_window_pattern")
    return _drop_unused_base(section)


def _write_gemma(config: DecoderConfig, *, model_type: str) -> dict[str, Any]:
    shared = _write_shared(config, model_type, _GEMMA_ACTIVATION) | write_local_layers(config)
    scale = round(config.score_scale**-2) if config.score_scale else config.head_size
    shared |= {"query_pre_attn_scalar": scale, "final_logit_softcapping": config.logit_softcap or None}
    if model_type == "gemma3_text":
        return shared | write_rope_by_kind(config)
    return shared | write_rope(config) | {"attn_logit_softcapping": config.score_softcap or None}


def _read_olmo(hf: dict[str, Any], *, model_type: str) -> dict[str, Any]:
    fields = Fields(hf)
    section = read_shared(fields, rms_norm_eps=1e-5) | read_fields(LLAMA_ACTIVATION, fields)
    section |= {"qk_norm": "all", "norm_position": "inner"}
    if model_type == "olmo2":
        section |= read_rope(fields, base=10_000.0, max_length=section["max_positions"])
    else:
        section |= read_local_layers(fields, default=list_layer_types(section["num_layers"], 4))
        section |= read_rope_by_kind(fields, base=5e5, max_length=section["max_positions"], local_base=5e5)
    fields.reject_unread()
    return _drop_unused_base(section)


def _write_olmo(config: DecoderConfig, *, model_type: str) -> dict[str, Any]:
    shared = _write_shared(config, model_type, LLAMA_ACTIVATION)
    if model_type == "olmo2":
        return shared | write_rope(config)
    return shared | write_local_layers(config) | write_rope_by_kind(config)


def _read_gemma3_text(hf: dict[str, Any]) -> dict[str, Any]:
    """The language model of a checkpoint that also reads images."""
    fields = Fields(hf)
    text = fields.section("text_config")
    if not text:
        raise UserError("config.json has no text_config")
    fields.reject_unread(*_GEMMA3_IMAGES, "tie_word_embeddings")
    tied = text.get("tie_word_embeddings", hf.get("tie_word_embeddings", True))
    sizes = {"vocab_size": 262_208, "num_attention_heads": 8, "hidden_size": 2304, "intermediate_size": 9216}
    return _read_gemma(sizes | text | {"tie_word_embeddings": tied}, model_type="gemma3_text")


def _write_gemma3_text(config: DecoderConfig) -> dict[str, Any]:
    raise UserError("Gemma3ForConditionalGeneration: the image encoder is not imported; export as Gemma3ForCausalLM")


def _rename_gemma3(name: str) -> str | None:
    """The name in Gemma3ForCausalLM, from that in published files or in the newest transformers."""
    bare = name.removeprefix("model.")
    if bare.startswith(("vision_tower.", "multi_modal_projector.")):
        return None
    if bare.startswith("language_model."):
        bare = bare.removeprefix("language_model.").removeprefix("model.")
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def _rename_llama(name: str) -> str | None:
    """Leave out the rotary frequencies, which older files hold as a buffer."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def _make_llama_architecture(read: Any, write: Any, **model_type: str) -> Architecture:
    read, write = functools.partial(read, **model_type), functools.partial(write, **model_type)
    return Architecture(read, write, decoder_rules.make_llama_rules, _rename_llama)


ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        _read_gpt2, _write_gpt2, decoder_rules.make_gpt2_rules, _rename_gpt2, ("rope_base",)
    ),
    "LlamaForCausalLM": _make_llama_architecture(_read_llama, _write_llama),
    "MistralForCausalLM": _make_llama_architecture(_read_mistral, _write_mistral),
    "Qwen3ForCausalLM": _make_llama_architecture(_read_qwen3, _write_qwen3),
    "Gemma2ForCausalLM": _make_llama_architecture(_read_gemma, _write_gemma, model_type="gemma2"),
    "Gemma3ForCausalLM": _make_llama_architecture(_read_gemma, _write_gemma, model_type="gemma3_text"),
    "Gemma3ForConditionalGeneration": Architecture(
        _read_gemma3_text, _write_gemma3_text, decoder_rules.make_llama_rules, _rename_gemma3
    ),
    "Olmo2ForCausalLM": _make_llama_architecture(_read_olmo, _write_olmo, model_type="olmo2"),
    "Olmo3ForCausalLM": _make_llama_architecture(_read_olmo, _write_olmo, model_type="olmo3"),
}
ARCHITECTURES = heads.add_variants(ARCHITECTURES, "GPT2LMHeadModel", "GPT2", "transformer.", ("lm_head.",))
for _stem in ("Llama", "Mistral", "Qwen3", "Gemma2", "Olmo2", "Olmo3"):
    ARCHITECTURES = heads.add_variants(ARCHITECTURES, f"{_stem}ForCausalLM", _stem, "model.", ("lm_head.",))
ARCHITECTURES = heads.add_variants(ARCHITECTURES, "Gemma3ForCausalLM", "Gemma3Text", "model.", ("lm_head.",))
