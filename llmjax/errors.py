"""Errors that are reported in one line, without a traceback."""

from collections.abc import Iterable
import difflib


class UserError(ValueError):
    """Bad input that the user can fix: one line that names the field, the value and the fix."""


class HardwareError(RuntimeError):
    """Results that correct hardware cannot give: one line that names the devices."""


def suggest(name: str, options: Iterable[str]) -> str:
    """' (did you mean X?)' where an option is close to `name`, else ''."""
    near = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
