"""Which fields of a source's records each objective reads besides the first text and its label."""

from collections.abc import Mapping

from llmjax.data.config import SourceConfig
from llmjax.errors import UserError

# Objective -> fields that every source needs, and those that it can also have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "contrastive": (("pair_field",), ("negative_field",)),
    "similarity": (("pair_field", "score_field"), ()),
    "dpo": (("chosen_field", "rejected_field"), ()),
    "reward": (("chosen_field", "rejected_field"), ()),
}
# Field -> the objectives that read it.
_USERS = {
    field: [name for name, lists in _FIELDS.items() if field in (*lists[0], *lists[1])]
    for field in sorted({field for needed, optional in _FIELDS.values() for field in (*needed, *optional)})
}


def check_text_fields(objective: str, sources: Mapping[str, SourceConfig]) -> None:
    """Raise UserError for a source that lacks a field of the objective, or has one that the objective does not read."""
    needed, optional = _FIELDS.get(objective, ((), ()))
    for name, source in sources.items():
        for field in needed:
            if not getattr(source, field):
                raise UserError(f"objective.name={objective!r}: set data.sources.{name}.{field}")
        read = {*needed, *optional} | ({"pair_field"} if source.label_field else set())
        for field, users in _USERS.items():
            if (value := getattr(source, field)) and field not in read:
                raise UserError(
                    f"data.sources.{name}.{field}={value!r}: objective.name={objective!r} does not read this field of "
                    f"a record; unset it, or set objective.name to one that does: {', '.join(users)}"
                )
