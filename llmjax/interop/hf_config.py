"""Read config.json so that each field is used, known to have no effect, or refused; and its rotary frequencies."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from llmjax.errors import UserError
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.rotary import yarn_attention_factor

_MISSING = object()
NUMBER = (int, float)
FULL, SLIDING = "full_attention", "sliding_attention"
_TYPE_NAMES = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
# Bounds far above every published model, so that a damaged config.json is refused before anything is allocated.
_MAX_NUMBER = 1e15
_MAX_SIZE = 1 << 24
MAX_EXPERTS = 1 << 16

# Fields of the base class of all configs, in transformers 2 to 5, that change no number of a forward pass in float32
# without dropout.
_BASE = frozenset(
    """
    add_cross_attention architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward cls_token_id
    decoder_start_token_id dtype eos_token_id finetuning_task gradient_checkpointing id2label is_decoder
    is_encoder_decoder label2id mask_token_id model_type name_or_path num_labels output_attentions output_hidden_states
    output_past pad_token_id prefix pretraining_tp problem_type quantization_config return_dict sep_token_id
    task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id use_bfloat16 use_cache use_return_dict
    """.split()  # noqa: SIM905
)
# Fields of GenerationConfig, which older releases kept in config.json.
_GENERATION = frozenset(
    """
    bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config constraints disable_compile
    diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id
    generation_config guidance_scale is_assistant length_penalty low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits
    output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate sequence_bias stop_strings suppress_tokens target_lookbehind temperature
    token_healing top_h top_k top_p typical_p watermarking_config
    """.split()  # noqa: SIM905
)
# Private fields, those of a fine-tuning library, how parameters are initialized, and rates of dropout.
_NEUTRAL_PATTERN = re.compile(r"_.*|unsloth_\w+|initializer_\w+|init_std|(\w+_)?(dropout|pdrop)(_prob|_rate)?")


class UnknownFieldError(UserError):
    """A field of config.json that no reader knows; `name` is its path, such as `rope_scaling.new_field`."""

    def __init__(self, name: str, value: Any):
        super().__init__(
            f"config.json: {shown(name, quote=False)}={shown(value)} is not a known field of this architecture; if it "
            f"changes no number of the model, accept it with --ignore={shown(name, quote=False)}"
        )
        self.name = name


class Fields:
    """The fields of config.json, or of a section of it, whose path such as "rope_scaling." errors put before a name."""

    def __init__(self, fields: Mapping[str, Any], path: str = ""):
        self._fields, self._path = fields, path
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> int:
        """A size without a default."""
        return self.size(name)

    def get(self, name: str, default: Any, *kinds: type) -> Any:
        """The value, or the default of the Hugging Face class if it is absent. null passes: it often means `none`.

        UserError for a value of another type than `kinds`, by default that of `default`, and for a number that is
        negative, not finite or above 1e15.
        """
        self._read.add(name)
        value = self._fields.get(name, default)
        if not kinds and default is not None:
            kinds = NUMBER if type(default) in NUMBER else (type(default),)
        if value is None or not kinds:
            return value
        if type(value) not in kinds:
            raise self._error(name, value, _TYPE_NAMES[kinds[0]])
        if type(value) in NUMBER and not 0 <= value <= _MAX_NUMBER:
            raise self._error(name, value, "a number from 0 to 1e15")
        return value

    def positive(self, name: str, default: float | None = None) -> Any:
        """A number above 0; the field is required if it has no default."""
        value = self.get(name, default, *NUMBER)
        if value is None or value == 0:
            raise self._missing(name) if name not in self._fields else self._error(name, value, "a number above 0")
        return value

    def size(self, name: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        """An integer from 1 to `most`; the field is required if it has no default."""
        self._read.add(name)
        value = self._fields.get(name, default)
        if value is None and default is None:
            raise self._missing(name)
        if type(value) is not int or not 1 <= value <= most:
            raise self._error(name, value, f"an integer from 1 to {most}")
        return value

    def optional_size(self, name: str, default: int = 0, most: int = _MAX_SIZE) -> int:
        """An integer from 0 to `most`; null stands for 0."""
        self._read.add(name)
        value = self._fields.get(name, default)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise self._error(name, value, f"an integer from 0 to {most}")
        return value or 0

    def section(self, name: str) -> dict[str, Any]:
        """A section, empty if it is absent or null."""
        value = self.get(name, None)
        if not isinstance(value, Mapping | None):
            raise self._error(name, value, "a section, such as {}")
        return dict(value or {})

    def layer_types(self, layers: int) -> list[str] | None:
        """The field layer_types, FULL or SLIDING for each layer; None if it is absent."""
        types = self.get("layer_types", None, list)
        if not types:
            return None
        for kind in types:
            if kind not in (FULL, SLIDING):
                raise UserError(f"config.json: layer_types holds {shown(kind)}; known are {SLIDING}, {FULL}")
        if len(types) != layers:
            raise UserError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
        return types

    def require(self, name: str, *allowed: Any) -> None:
        """UserError if the field is present and its value is not one of `allowed`, those that are implemented."""
        self._read.add(name)
        value = self._fields.get(name, _MISSING)
        # In Python True equals 1.
        is_equal = lambda other: value == other and (type(value) is bool) == (type(other) is bool)
        if value is not _MISSING and not any(map(is_equal, allowed)):
            supported = " or ".join(repr(value) for value in allowed)
            raise UserError(f"config.json: {self._path}{name}={shown(value)} is not supported, only {supported}")

    def choice(self, name: str, names: Mapping[str, str], default: str) -> str:
        """The llmjax name of a Hugging Face name; UserError for one that is not in `names`."""
        value = self.get(name, None) or default
        if not isinstance(value, str) or value not in names:
            raise UserError(f"config.json: {self._path}{name}={shown(value)} is not supported, only {', '.join(names)}")
        return names[value]

    def reject_unread(self, *neutral: str) -> None:
        """UnknownFieldError for the first field that was not read; `neutral` are further ones that change no number."""
        if not self._path:
            self.require("pruned_heads", {}, None)
            self.require("tie_encoder_decoder", False, None)
        for name, value in self._fields.items():
            if name in self._read or name in neutral or value is None or (not self._path and _is_neutral(name)):
                continue
            raise UnknownFieldError(f"{self._path}{name}", value)

    def _missing(self, name: str) -> UserError:
        return UserError(f"config.json has no {self._path}{name}")

    def _error(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(f"config.json: {self._path}{name}={shown(value)}: expected {expected}")


def shown(value: Any, quote: bool = True) -> str:
    """A value for an error of one line: its repr, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:  # repr of a very large int is slow, or refused
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    text = text if quote or not str(value).isprintable() else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def attention_pattern(layer_types: Sequence[str]) -> str:
    """The shortest model.attention_pattern that gives these layer types."""
    letters = "".join("l" if kind == SLIDING else "g" for kind in layer_types)
    repeats = lambda period: (letters[:period] * len(letters)).startswith(letters)
    return next(letters[:period] for period in range(1, len(letters) + 1) if repeats(period))


def _is_neutral(name: str) -> bool:
    return name in _BASE or name in _GENERATION or _NEUTRAL_PATTERN.fullmatch(name) is not None


# Rotary frequencies: the newer field rope_parameters, and the older rope_theta and rope_scaling.
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
    return {"rope_theta": config.rope_base, "rope_parameters": _rope_parameters(config)}


def write_rope_by_kind(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json for what `read_rope_by_kind` reads."""
    if any(config.local_layers) and config.scaling is not None and not config.rope_local_base:
        raise UserError(
            f"model.rope_local_base=0.0: rope_scaling={config.rope_scaling!r} would be lost in the sliding layers"
        )
    local = {"rope_type": "default", "rope_theta": config.rope_local_base or config.rope_base}
    return {"rope_parameters": {FULL: _rope_parameters(config), SLIDING: local}}


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
        section |= {"rope_attention_factor": _attention_factor(rope, factor)}
    rope.reject_unread()
    return section


def _attention_factor(rope: Fields, factor: float) -> float:
    names = ("attention_factor", "mscale", "mscale_all_dim")
    attention_factor, weight, weight_all_dims = (rope.get(name, None, *NUMBER) for name in names)
    if attention_factor is not None:
        return float(attention_factor)
    if weight and weight_all_dims:
        return yarn_attention_factor(factor, weight) / yarn_attention_factor(factor, weight_all_dims)
    return yarn_attention_factor(factor)


def _rope_parameters(config: DecoderConfig) -> dict[str, Any]:
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
