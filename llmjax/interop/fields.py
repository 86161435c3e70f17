"""Reading a config.json: every field is used, required to have a value, known to change no number, or refused."""

from collections.abc import Mapping
import re
from typing import Any

from llmjax.errors import UserError

_MISSING = object()
NUMBER = (int, float)
FULL, SLIDING = "full_attention", "sliding_attention"
# What a value of a type is called in errors; bool is a subclass of int in Python alone.
_CALLED = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
# Bounds far above every published model, so that a damaged config.json is refused before anything is allocated.
_MAX_NUMBER = 1e15
_MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 16

# Fields that the base class of all configs keeps, in transformers 2 to 5, and that change no number of a forward pass
# in float32 without dropout.
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
# How text is generated: fields of GenerationConfig, which older releases kept in config.json.
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


class UnknownField(UserError):
    """A field of config.json that no reader knows; `name` is its path, such as `rope_scaling.new_field`."""

    def __init__(self, name: str, value: Any):
        super().__init__(
            f"config.json: {shown(name, quote=False)}={shown(value)} is not a known field of this architecture; if it "
            f"changes no number of the model, accept it with --ignore={shown(name, quote=False)}"
        )
        self.name = name


class Fields:
    """The fields of a config.json, or of a section of it (`where` is put before their names in errors)."""

    def __init__(self, fields: Mapping[str, Any], where: str = ""):
        self._fields, self._where = fields, where
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> int:
        """A size without a default."""
        return self.size(name)

    def get(self, name: str, default: Any, *kinds: type) -> Any:
        """The value, or the default of their config class where it is absent. null passes: it often means `none`.

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
            raise self._error(name, value, _CALLED[kinds[0]])
        if type(value) in NUMBER and not 0 <= value <= _MAX_NUMBER:
            raise self._error(name, value, "a number from 0 to 1e15")
        return value

    def positive(self, name: str, default: float | None = None) -> Any:
        """A number above 0, which must be there where it has no default."""
        value = self.get(name, default, *NUMBER)
        if value is None or value == 0:
            raise self._missing(name) if name not in self._fields else self._error(name, value, "a number above 0")
        return value

    def size(self, name: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        """A whole number from 1 to `most`, which must be there where it has no default."""
        self._read.add(name)
        value = self._fields.get(name, default)
        if value is None and default is None:
            raise self._missing(name)
        if type(value) is not int or not 1 <= value <= most:
            raise self._error(name, value, f"a whole number from 1 to {most}")
        return value

    def optional_size(self, name: str, default: int = 0, most: int = _MAX_SIZE) -> int:
        """A whole number from 0 to `most`; null stands for 0."""
        self._read.add(name)
        value = self._fields.get(name, default)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise self._error(name, value, f"a whole number from 0 to {most}")
        return value or 0

    def section(self, name: str) -> dict[str, Any]:
        """A section, empty where it is absent or null."""
        value = self.get(name, None)
        if not isinstance(value, Mapping | None):
            raise self._error(name, value, "a section, such as {}")
        return dict(value or {})

    def layer_types(self, layers: int) -> list[str] | None:
        """Whether each layer attends to everything or to a sliding window; None where the field is absent."""
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
        """UserError where the field is there and has another value than `allowed`, those that are implemented."""
        self._read.add(name)
        value = self._fields.get(name, _MISSING)
        same = lambda one: value == one and (type(value) is bool) == (type(one) is bool)  # True equals 1
        if value is not _MISSING and not any(map(same, allowed)):
            known = " or ".join(repr(value) for value in allowed)
            raise UserError(f"config.json: {self._where}{name}={shown(value)} is not supported, only {known}")

    def choice(self, name: str, names: Mapping[str, str], default: str) -> str:
        """Our name for theirs; UserError for one that is not in `names`."""
        value = self.get(name, None) or default
        if not isinstance(value, str) or value not in names:
            known = ", ".join(names)
            raise UserError(f"config.json: {self._where}{name}={shown(value)} is not supported, only {known}")
        return names[value]

    def reject_unread(self, *neutral: str) -> None:
        """UnknownField for the first field that was not read; `neutral` are further ones that change no number."""
        if not self._where:
            self.require("pruned_heads", {}, None)
            self.require("tie_encoder_decoder", False, None)
        for name, value in self._fields.items():
            if name in self._read or name in neutral or value is None or (not self._where and _is_neutral(name)):
                continue
            raise UnknownField(f"{self._where}{name}", value)

    def _missing(self, name: str) -> UserError:
        return UserError(f"config.json has no {self._where}{name}")

    def _error(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(f"config.json: {self._where}{name}={shown(value)}: expected {expected}")


def shown(value: Any, quote: bool = True) -> str:
    """A value for an error of one line: its repr, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:  # repr of a very large int is slow, or refused
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    text = text if quote or not str(value).isprintable() else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_neutral(name: str) -> bool:
    return name in _BASE or name in _GENERATION or _NEUTRAL_PATTERN.fullmatch(name) is not None
