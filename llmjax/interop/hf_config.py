"""Read config.json so that each field is used, known to have no effect, or refused; tables of its fields."""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any, NamedTuple

from llmjax.errors import UserError
from llmjax.models.base import MAX_LAYERS

_MISSING = object()
NUMBER = (int, float)
FULL, SLIDING = "full_attention", "sliding_attention"
_TYPE_NAMES = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
# Bounds far above every published model, so that a damaged config.json is refused before anything is allocated.
_MAX_NUMBER = 1e15
_MAX_SIZE, _MAX_EXPERTS = 1 << 24, 1 << 16
_MAX_SIZES = {
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "first_k_dense_replace"), MAX_LAYERS
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "n_shared_experts"), _MAX_EXPERTS),
}
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

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
        printable_name = format_value(name, quote=False)
        super().__init__(
            f"config.json: {printable_name}={format_value(value)} is not a known field of this architecture; if it "
            f"changes no number of the model, accept it with --ignore={printable_name}"
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

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer from `least` to the bound of its kind; the field is required if it has no default."""
        self._read.add(name)
        value, most = self._fields.get(name, default), _MAX_SIZES.get(name, _MAX_SIZE)
        if value is None and default is None:
            raise self._missing(name)
        if type(value) is not int or not least <= value <= most:
            raise self._error(name, value, f"an integer from {least} to {most}")
        return value

    def optional_size(self, name: str, default: int = 0) -> int:
        """An integer from 0 to the bound of its kind; null stands for 0."""
        self._read.add(name)
        return 0 if self._fields.get(name, default) is None else self.size(name, default, least=0)

    def activation(self, name: str, default: str) -> str:
        """The llmjax name of an activation."""
        return self.choice(name, _ACTIVATIONS, default)

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
                raise UserError(f"config.json: layer_types holds {format_value(kind)}; known are {SLIDING}, {FULL}")
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
            raise UserError(f"config.json: {self._path}{name}={format_value(value)} is not supported, only {supported}")

    def choice(self, name: str, names: Mapping[str, str], default: str) -> str:
        """The llmjax name of a Hugging Face name; UserError for one that is not in `names`."""
        value = self.get(name, None) or default
        if not isinstance(value, str) or value not in names:
            raise UserError(
                f"config.json: {self._path}{name}={format_value(value)} is not supported, only {', '.join(names)}"
            )
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
        return UserError(f"config.json: {self._path}{name}={format_value(value)}: expected {expected}")


def format_value(value: Any, quote: bool = True) -> str:
    """A value for an error of one line: its repr, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:  # repr of a very large int is slow, or refused
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    text = text if quote or not str(value).isprintable() else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def find_attention_pattern(layer_types: Sequence[str]) -> str:
    """The shortest model.attention_pattern that gives these layer types."""
    letters = "".join("l" if kind == SLIDING else "g" for kind in layer_types)
    repeats = lambda period: (letters[:period] * len(letters)).startswith(letters)
    return next(letters[:period] for period in range(1, len(letters) + 1) if repeats(period))


def _is_neutral(name: str) -> bool:
    return name in _BASE or name in _GENERATION or _NEUTRAL_PATTERN.fullmatch(name) is not None


# Field of a model's config -> the property that resolves it, where 0 stands for a size derived from other fields.
RESOLVED = {
    "head_dim": "head_size",
    "num_kv_heads": "kv_heads",
    "mlp": "mlp_size",
    "expert_mlp": "expert_size",
    "value_dim": "value_size",
    "num_decoder_layers": "decoder_layers",
}


class Field(NamedTuple):
    """A field of config.json and the field of section `model` with the same meaning.

    name     in section `model`; "" for a field with one supported value, `default`
    read     (fields, hf_name, default) -> value in section `model`
    write    value in section `model` -> value in config.json
    """

    hf_name: str
    name: str
    read: Callable[..., Any] = Fields.size
    default: Any = None
    write: Callable[[Any], Any] = lambda value: value


# Sizes that most architectures name alike.
COMMON_SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "embed"),
    Field("num_attention_heads", "num_heads"),
)


def constant(hf_name: str, value: Any) -> Field:
    """A field with one supported value, which is written too."""
    return Field(hf_name, "", Fields.require, value, lambda _: value)


def activation(hf_name: str, default: str, gelu_tanh: str = "gelu_new") -> Field:
    """An activation; files of the class name the tanh form `gelu_tanh`."""
    write = lambda name: gelu_tanh if name == "gelu_tanh" else name
    return Field(hf_name, "activation", Fields.activation, default, write)


def read_fields(table: Sequence[Field], fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The fields of section `model`; `defaults` by Hugging Face name take the place of those in the table."""
    section = {}
    for field in table:
        value = field.read(fields, field.hf_name, defaults.get(field.hf_name, field.default))
        if field.name:
            section[field.name] = value
    return section


def write_fields(table: Sequence[Field], config: Any) -> dict[str, Any]:
    """The fields of config.json, the inverse of `read_fields`."""
    values = {name: getattr(config, RESOLVED.get(name, name)) for name in {field.name for field in table} - {""}}
    return {field.hf_name: field.write(values.get(field.name)) for field in table}
