"""`llmjax fields`: list every config field with its docstring and default."""

import dataclasses
import textwrap
import typing

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

    shown, explained = [], set()

    def show(cls: type, path: str, family: str = "") -> None:
        hints = typing.get_type_hints(cls)
        shown.append(path)
        if not flags.section or path == flags.section:
            print(f"[{path or 'top level'}{family}] ", end="")
            for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
                if base not in explained:  # families share base classes
                    print(f"{textwrap.dedent('    ' + (base.__doc__ or '')).strip()}\n")
                    explained.add(base)
            for field in dataclasses.fields(cls):
                if not dataclasses.is_dataclass(hints[field.name]) and field.default is not dataclasses.MISSING:
                    print(f"  --config.{path}{'.' if path else ''}{field.name}={field.default!r}")
            print()
        for name, hint in hints.items():
            families = families_of(hint)
            for family, config in families.items():
                show(config, f"{path}.{name}" if path else name, f", {name}.family={family}")
            if families:
                continue
            inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
            if inner is not None:
                entry = f"{name}.NAME" if inner is not hint else name
                show(typing.cast(type, inner), f"{path}.{entry}" if path else entry)

    show(RunConfig, "")
    show(CurateConfig, "curate")
    if flags.section and flags.section not in shown:
        sections = ", ".join(dict.fromkeys(shown[1:]))
        raise UserError(f"no section {flags.section!r}{suggest(flags.section, shown)}: choose one of {sections}")
    return 0
