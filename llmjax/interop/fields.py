"""Reading a config.json: every field is used, demanded, known to be without effect here, or refused by name."""

from collections.abc import Mapping
from typing import Any

from llmjax.config import UserError

_NONE = object()

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
        """The value; UserError where there is none."""
        if self.get(name, None) is None:
            raise UserError(f"config.json has no {self._where}{name}")
        return self._fields[name]

    def get(self, name: str, default: Any) -> Any:
        """The value, or the one that their class gives the field where it is absent."""
        self._seen.add(name)
        return self._fields.get(name, default)

    def must(self, name: str, *allowed: Any) -> None:
        """UserError where the field is there and has another value than those that we can honour."""
        value = self.get(name, _NONE)
        if value is not _NONE and value not in allowed:
            known = " or ".join(repr(value) for value in allowed)
            raise UserError(f"config.json: {self._where}{name}={value!r} is not supported, only {known}")

    def choice(self, name: str, names: Mapping[str, str], default: str) -> str:
        """Our word for theirs; UserError for one that we have none for."""
        value = self.get(name, None) or default
        if value not in names:
            raise UserError(f"config.json: {self._where}{name}={value!r} is not supported, only {', '.join(names)}")
        return names[value]

    def done(self, *neutral: str) -> None:
        """UserError for the first field that nothing has asked for; `neutral` are those without effect on us, such as
        rates of dropout."""
        for name, value in self._fields.items():
            if name not in self._seen and name not in _NEUTRAL and name not in neutral and value is not None:
                raise UserError(f"config.json: {self._where}{name}={value!r} is not known for this architecture")
