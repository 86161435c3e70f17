"""What every family's settings are checked for, and how lengths are rounded."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.errors import UserError, suggest
from llmjax.nn.stack import REMAT

_NAMES = {"remat": tuple(REMAT), "dtype": ("float32", "bfloat16"), "param_dtype": ("float32", "bfloat16")}
_AT_LEAST = {"vocab_size": 0, "vocab_multiple": 1, "num_layers": 1, "embed": 1}


def names(config: Any, allowed: Mapping[str, Sequence[str]]) -> None:
    """UserError for a field that is none of the names `allowed` for it; those that all families have are known."""
    for field, known in {"family": (type(config).family,), **allowed, **_NAMES}.items():
        value = getattr(config, field)
        if value not in known:
            raise UserError(f"model.{field}={value!r}: choose one of {', '.join(known)}{suggest(value, known)}")


def numbers(config: Any, at_least: Mapping[str, float], above_zero: Sequence[str]) -> None:
    """UserError for a field below what it must be at least, or not above 0; those that all families have are known."""
    for field, least in {**_AT_LEAST, **at_least}.items():
        if not getattr(config, field) >= least:
            raise UserError(f"model.{field}={getattr(config, field)}: must be at least {least}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout={config.dropout}: must be at least 0 and below 1")
    for field in above_zero:
        if not getattr(config, field) > 0:
            raise UserError(f"model.{field}={getattr(config, field)}: must be above 0")


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is no smaller than the number."""
    return -(-number // multiple) * multiple
