"""Rotary frequencies in a config.json: the newer field rope_parameters, and the older rope_theta and rope_scaling."""

from collections.abc import Mapping
from typing import Any

from llmjax.errors import UserError
from llmjax.interop.fields import FULL, NUMBER, SLIDING, Fields
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.rotary import yarn_attention_factor

_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read(fields: Fields, *, base: float, longest: int) -> dict[str, Any]:
    """The rope_* fields of section `model`, for a model whose layers are all turned alike; `base` where none is
    given, and `longest` for the length of the texts that it was first trained on.

    Where that length stands both beside the section and in it, the reference takes the one beside it.
    """
    theta, new, old = fields.get("rope_theta", base), fields.section("rope_parameters"), fields.section("rope_scaling")
    original = fields.optional_size("original_max_position_embeddings") or None
    return _read(old or new, "rope_scaling." if old else "rope_parameters.", theta, longest, original)


def read_by_kind(
    fields: Fields, *, base: float, longest: int, local_base: float, old_local: str | None = None
) -> dict[str, Any]:
    """The same for a model with frequencies for full_attention and others for sliding_attention.

    The older fields rope_scaling and rope_theta are those of the full layers; `old_local` names the one that holds
    the base of the sliding layers, if there is any.
    """
    both = Fields(fields.section("rope_parameters"), "rope_parameters.")
    old = fields.section("rope_scaling")
    full, sliding = both.section(FULL) | old, both.section(SLIDING)
    both.reject_unread()
    theta, local_theta = fields.get("rope_theta", base), fields.get(old_local, local_base) if old_local else local_base
    fields.get("original_max_position_embeddings", None)  # without effect in the reference: the sections have their own
    section = _read(full, "rope_scaling." if old else "rope_parameters.full_attention.", theta, longest)
    if not section.get("rope_truncate", True):
        # The reference asks for it where these models do not have it, and always truncates.
        raise UserError("config.json: rope_parameters.full_attention.truncate=False is not supported, only True")
    local = _read(sliding, "rope_parameters.sliding_attention.", local_theta, longest)
    if "rope_scaling" in local:
        kind = sliding.get("rope_type")
        raise UserError(
            f"config.json: rope_parameters.sliding_attention.rope_type={kind!r} is not supported, only 'default'"
        )
    alike = local["rope_base"] == section["rope_base"] and "rope_scaling" not in section
    return section | {"rope_local_base": 0.0 if alike else local["rope_base"]}


def write(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json for what `read` reads."""
    return {"rope_theta": config.rope_base, "rope_parameters": _write(config)}


def write_by_kind(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json for what `read_by_kind` reads."""
    if any(config.local) and config.scaling is not None and not config.rope_local_base:
        raise UserError(
            f"model.rope_local_base=0.0: rope_scaling={config.rope_scaling!r} would be lost in the sliding layers"
        )
    local = {"rope_type": "default", "rope_theta": config.rope_local_base or config.rope_base}
    return {"rope_parameters": {FULL: _write(config), SLIDING: local}}


def _read(
    given: Mapping[str, Any], where: str, theta: Any, longest: int, original: int | None = None
) -> dict[str, Any]:
    rope = Fields(given, where)
    name = "rope_type" if rope.get("rope_type", None) else "type"
    kind = rope.choice(name, _KINDS, "default")
    rope.get("type", None)
    rope.require("partial_rotary_factor", 1.0, None)
    section: dict[str, Any] = {"rope_base": float(rope.get("rope_theta", None, *NUMBER) or theta or 0)}
    inner = rope.optional_size("original_max_position_embeddings")
    start = original or inner or longest
    if kind != "none":
        section |= {"rope_scaling": kind}
    if kind == "linear":
        section |= {"rope_factor": float(rope.positive("factor"))}
    if kind == "llama3":
        section |= {"rope_factor": float(rope.positive("factor")), "rope_original": start}
        section |= {
            "rope_low": float(rope.positive("low_freq_factor")),
            "rope_high": float(rope.positive("high_freq_factor")),
        }
    if kind == "yarn":
        if "factor" not in given:  # null has a meaning: as many times as longer texts are longer
            raise UserError(f"config.json has no {where}factor")
        factor = float(rope.get("factor", None, *NUMBER) or longest / start)
        section |= {"rope_factor": factor, "rope_original": start, "rope_truncate": rope.get("truncate", True)}
        section |= {"rope_low": float(rope.get("beta_slow", None, *NUMBER) or 1)}
        section |= {"rope_high": float(rope.get("beta_fast", None, *NUMBER) or 32)}
        section |= {"rope_attention_factor": _attention_factor(rope, factor)}
    rope.reject_unread()
    return section


def _attention_factor(rope: Fields, factor: float) -> float:
    own, weight, all_dims = (rope.get(name, None, *NUMBER) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if own is not None:
        return float(own)
    if weight and all_dims:
        return yarn_attention_factor(factor, weight) / yarn_attention_factor(factor, all_dims)
    return yarn_attention_factor(factor)


def _write(config: DecoderConfig) -> dict[str, Any]:
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
