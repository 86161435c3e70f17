"""Reading a config.json: every field is used, demanded, known to be without effect here, or refused by name."""

from collections.abc import Mapping
from typing import Any

from llmjax.config import UserError

_NONE = object()
NUMBER = (int, float)
FULL, SLIDING = "full_attention", "sliding_attention"
# What a field of a kind is called in errors; true and false are numbers in Python alone.
_CALLED = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}

# What every config.json may hold and what changes no number of a forward pass in float32 without dropout.
_NEUTRAL = {
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    "is_encoder_decoder",
    "task_specific_params",
    "_name_or_path",
    "_attn_implementation",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "cls_token_id",
    "sep_token_id",
    "unk_token_id",
    "pretraining_tp",
    "quantization_config",
}


class Fields:
    """The fields of a config.json, or of a section of it (`where` is put before their names in errors)."""

    def __init__(self, fields: Mapping[str, Any], where: str = ""):
        self._fields, self._where = fields, where
        self._seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """A number above 0; UserError where there is none."""
        if self.get(name, None) is None:
            raise UserError(f"config.json has no {self._where}{name}")
        return self.positive(name, None)

    def get(self, name: str, default: Any, *kinds: type) -> Any:
        """The value, or the one that their class gives the field where it is absent.

        UserError for a value of another kind than `kinds`, by default that of `default`. null passes: in many fields
        it stands for `none`.
        """
        self._seen.add(name)
        value = self._fields.get(name, default)
        if not kinds and default is not None:
            kinds = NUMBER if type(default) in NUMBER else (type(default),)
        if value is None or not kinds or type(value) in kinds:
            return value
        raise UserError(f"config.json: {self._where}{name}={value!r}: expected {_CALLED[kinds[0]]}")

    def positive(self, name: str, default: float | None) -> Any:
        """The same for a number that must be there, if only by default, and above 0."""
        value = self.get(name, default, *NUMBER)
        if value is None or not value > 0:
            raise UserError(f"config.json: {self._where}{name}={value!r}: expected a number above 0")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """A section, empty where it is absent or null."""
        value = self.get(name, None)
        if not isinstance(value, Mapping | None):
            raise UserError(f"config.json: {self._where}{name}={value!r}: expected a section, such as {{}}")
        return dict(value or {})

    def layer_types(self, layers: int) -> list[str] | None:
        """Of each layer, whether it sees all or slides; None where the field is absent."""
        types = self.get("layer_types", None, list)
        if not types:
            return None
        for kind in types:
            if kind not in (FULL, SLIDING):
                raise UserError(f"config.json: layer_types holds {kind!r}; known are {SLIDING}, {FULL}")
        if len(types) != layers:
            raise UserError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
        return types

    def must(self, name: str, *allowed: Any) -> None:
        """UserError where the field is there and has another value than those that we can honour."""
        self._seen.add(name)
        value = self._fields.get(name, _NONE)
        if value is not _NONE and value not in allowed:
            known = " or ".join(repr(value) for value in allowed)
            raise UserError(f"config.json: {self._where}{name}={value!r} is not supported, only {known}")

    def choice(self, name: str, names: Mapping[str, str], default: str) -> str:
        """Our word for theirs; UserError for one that we have none for."""
        value = self.get(name, None) or default
        if not isinstance(value, str) or value not in names:
            raise UserError(f"config.json: {self._where}{name}={value!r} is not supported, only {', '.join(names)}")
        return names[value]

    def done(self, *neutral: str) -> None:
        """UserError for the first field that nothing has asked for; `neutral` are those without effect on us, such as
        rates of dropout."""
        for name, value in self._fields.items():
            if name not in self._seen and name not in _NEUTRAL and name not in neutral and value is not None:
                raise UserError(f"config.json: {self._where}{name}={value!r} is not known for this architecture")
