"""Rotary frequencies in config.json: the newer field rope_parameters, and the older rope_theta and rope_scaling."""

from collections.abc import Mapping
from typing import Any

from llmjax.errors import UserError
from llmjax.interop.hf_config import FULL, NUMBER, SLIDING, Fields
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.rotary import yarn_attention_factor

_ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read_rope(fields: Fields, *, base: float, max_length: int) -> dict[str, Any]:
    """The rope_* fields of section `model`, for a model whose layers all have the same frequencies.

    base         if config.json has none
    max_length   the length of the texts of the first training, unless config.json has one. If it has one in the section
                 and one beside it, the reference uses the one beside it.
    """
    theta, new, old = fields.get("rope_theta", base), fields.section("rope_parameters"), fields.section("rope_scaling")
    original = fields.optional_size("original_max_position_embeddings") or None
    return _read_rope(old or new, "rope_scaling." if old else "rope_parameters.", theta, max_length, original)


def read_rope_by_kind(
    fields: Fields, *, base: float, max_length: int, local_base: float, old_local: str | None = None
) -> dict[str, Any]:
    """The same for a model with frequencies for full_attention and others for sliding_attention.

    The older fields rope_scaling and rope_theta are those of the full layers; `old_local` names the one with the base
    of the sliding layers, if there is any.
    """
    both = Fields(fields.section("rope_parameters"), "rope_parameters.")
    old = fields.section("rope_scaling")
    full, sliding = both.section(FULL) | old, both.section(SLIDING)
    both.reject_unread()
    theta, local_theta = fields.get("rope_theta", base), fields.get(old_local, local_base) if old_local else local_base
    fields.get("original_max_position_embeddings", None)  # the reference reads only those of the sections
    section = _read_rope(full, "rope_scaling." if old else "rope_parameters.full_attention.", theta, max_length)
    if not section.get("rope_truncate", True):
        # The reference looks for it in the wrong section, and always truncates.
        raise UserError("config.json: rope_parameters.full_attention.truncate=False is not supported, only True")
    local = _read_rope(sliding, "rope_parameters.sliding_attention.", local_theta, max_length)
    if "rope_scaling" in local:
        kind = sliding.get("rope_type")
        raise UserError(
            f"config.json: rope_parameters.sliding_attention.rope_type={kind!r} is not supported, only 'default'"
        )
    is_same = local["rope_base"] == section["rope_base"] and "rope_scaling" not in section
    return section | {"rope_local_base": 0.0 if is_same else local["rope_base"]}


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json for what `read_rope` reads."""
    return {"rope_theta": config.rope_base, "rope_parameters": _write_rope_parameters(config)}


def write_rope_by_kind(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json for what `read_rope_by_kind` reads."""
    if any(config.local_layers) and config.scaling is not None and not config.rope_local_base:
        raise UserError(
            f"model.rope_local_base=0.0: rope_scaling={config.rope_scaling!r} would be lost in the sliding layers"
        )
    local = {"rope_type": "default", "rope_theta": config.rope_local_base or config.rope_base}
    return {"rope_parameters": {FULL: _write_rope_parameters(config), SLIDING: local}}


def _read_rope(
    rope_fields: Mapping[str, Any], path: str, theta: Any, max_length: int, original: int | None = None
) -> dict[str, Any]:
    rope = Fields(rope_fields, path)
    name = "rope_type" if rope.get("rope_type", None) else "type"
    kind = rope.choice(name, _ROPE_KINDS, "default")
    rope.get("type", None)
    rope.require("partial_rotary_factor", 1.0, None)
    section: dict[str, Any] = {"rope_base": float(rope.get("rope_theta", None, *NUMBER) or theta or 0)}
    original_in_section = rope.optional_size("original_max_position_embeddings")
    original = original or original_in_section or max_length
    if kind != "none":
        section |= {"rope_scaling": kind}
    if kind == "linear":
        section |= {"rope_factor": float(rope.positive("factor"))}
    if kind == "llama3":
        section |= {"rope_factor": float(rope.positive("factor")), "rope_original": original}
        section |= {
            "rope_low": float(rope.positive("low_freq_factor")),
            "rope_high": float(rope.positive("high_freq_factor")),
        }
    if kind == "yarn":
        if "factor" not in rope_fields:  # null means the quotient of the two lengths
            raise UserError(f"config.json has no {path}factor")
        factor = float(rope.get("factor", None, *NUMBER) or max_length / original)
        section |= {"rope_factor": factor, "rope_original": original, "rope_truncate": rope.get("truncate", True)}
        section |= {"rope_low": float(rope.get("beta_slow", None, *NUMBER) or 1)}
        section |= {"rope_high": float(rope.get("beta_fast", None, *NUMBER) or 32)}
        section |= {"rope_attention_factor": _read_attention_factor(rope, factor)}
    rope.reject_unread()
    return section


def _read_attention_factor(rope: Fields, factor: float) -> float:
    names = ("attention_factor", "mscale", "mscale_all_dim")
    attention_factor, weight, weight_all_dims = (rope.get(name, None, *NUMBER) for name in names)
    if attention_factor is not None:
        return float(attention_factor)
    if weight and weight_all_dims:
        return yarn_attention_factor(factor, weight) / yarn_attention_factor(factor, weight_all_dims)
    return yarn_attention_factor(factor)


def _write_rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        rope |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "attention_factor": scaling.attention_factor}
        rope |= {} if scaling.truncate else {"truncate": False}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original
    return rope
