"""`llmjax fields`: list every config field with its docstring and default."""

from collections.abc import Iterator, Mapping
import dataclasses
import textwrap
import typing
from typing import NamedTuple

from llmjax.binding import families_of
from llmjax.cli.flags import make_parser
from llmjax.errors import UserError, suggest


def fields(arguments: list[str]) -> int:
    """Explain the config."""
    parser = make_parser(
        "fields",
        "List every config field with its meaning, unit and default.",
        "llmjax fields optimizer",
        overrides=False,
    )
    parser.add_argument("section", nargs="?", metavar="SECTION", help="one section, such as model or data.tokenizer")
    flags = parser.parse_args(arguments)
    from llmjax.curate.config import CurateConfig
    from llmjax.run.config import RunConfig

    sections = [*_list_sections(RunConfig), *_list_sections(CurateConfig, "curate")]
    paths = list(dict.fromkeys(section.path for section in sections if section.path))
    if flags.section and flags.section not in paths:
        near = suggest(flags.section, paths)
        raise UserError(f"no section {flags.section!r}{near}: choose one of {', '.join(paths)}")
    explained: set[type] = set()
    for section in sections:
        if not flags.section or section.path == flags.section:
            _print_section(section, explained)
    return 0


class _Section(NamedTuple):
    """A dataclass of the config, its dotted path, and its family where the section has several."""

    cls: type
    path: str
    family: str


def _list_sections(cls: type, path: str = "", family: str = "") -> Iterator[_Section]:
    """The section of `cls` and all sections below it. The entries of an open map have the name NAME."""
    yield _Section(cls, path, family)
    for name, hint in typing.get_type_hints(cls).items():
        field = f"{path}.{name}" if path else name
        families = families_of(hint)
        for family_name, config in families.items():
            yield from _list_sections(config, field, f", {name}.family={family_name}")
        entry = next((inner for inner in typing.get_args(hint) if dataclasses.is_dataclass(inner)), None)
        if dataclasses.is_dataclass(hint):
            yield from _list_sections(typing.cast(type, hint), field)
        elif entry is not None and not families:
            yield from _list_sections(typing.cast(type, entry), f"{field}.NAME")


def _print_section(section: _Section, explained: set[type]) -> None:
    """Print docstrings, except those of base classes in `explained`, and the default of every field."""
    cls, path, family = section
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base) and base not in explained]
    explained.update(bases)  # families share base classes
    docstrings = [textwrap.dedent("    " + (base.__doc__ or "")).strip() for base in bases] or ["(fields as above)"]
    print(f"[{path or 'top level'}{family}] " + "\n\n".join(docstrings) + "\n")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if typing.get_origin(hints[field.name]) is Mapping and typing.get_args(hints[field.name])[1] is float:
            print(f"  --config.{path}.{field.name}.NAME=NUMBER")
        if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default):
            print(f"  --config.{path}{'.' if path else ''}{field.name}={field.default!r}")
    print()
