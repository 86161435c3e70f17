"""Select dotted names, such as those of parameters and layers, by patterns with `*`."""

from collections.abc import Iterable
import fnmatch

from llmjax.errors import UserError, suggest


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches the dotted name, or a module that contains it: `embed` and `embed.table`."""
    return any(fnmatch.fnmatchcase(name, form) for pattern in patterns for form in (pattern, f"{pattern}.*"))


def check(field: str, patterns: Iterable[str], names: Iterable[str], kind: str) -> None:
    """Raise UserError for a pattern of a config field that matches none of `names`, with the nearest of them.

    kind   what the names are, such as "parameter"
    """
    names = list(names)
    parts = (name.split(".") for name in names)
    modules = {".".join(path[:end]): None for path in parts for end in range(1, len(path) + 1)}
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            near = suggest(pattern, modules)
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"{field}: {pattern!r} matches no {kind}{near}; there are {shown or 'none'}")
