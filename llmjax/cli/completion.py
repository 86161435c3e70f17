"""Shell completion with argcomplete, from the parsers of the commands themselves.

bash and zsh: eval "$(register-python-argcomplete llmjax)"
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import os
import typing

import argcomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter
from argcomplete.lexers import split_line

from llmjax.binding import families_of, shipped_files
from llmjax.cli.flags import Parser


def complete(commands: Mapping[str, Callable[[list[str]], int]]) -> None:
    """Print the completions of the command line in COMP_LINE and end the process.

    The command builds its parser and calls `parse_args`, where `Parser.completer` prints the completions.
    """
    _, prefix, _, words, _ = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    is_override = prefix.startswith("--config.")
    Parser.completer = lambda parser: _print_completions(parser, is_override)
    if len(words) > 1 and words[1] in commands:
        commands[words[1]](words[2:])
    parser = Parser(prog="llmjax")
    parser.add_argument("command", choices=list(commands))
    parser.parse_args([])


def _print_completions(parser: Parser, is_override: bool) -> None:
    for action in parser._actions:
        name = action.dest
        if name == "config":
            action.completer = _config_names  # type: ignore[attr-defined]
        elif name in ("workdir", "runs", "to", "source", "dump"):
            action.completer = DirectoriesCompleter()  # type: ignore[attr-defined]
    if is_override and parser.takes_overrides:
        for field in _fields(parser.prog):
            parser.add_argument(f"--config.{field}")
    # argcomplete reads the number of words in COMP_LINE before the parser's arguments from this variable.
    os.environ["_ARGCOMPLETE"] = str(len(parser.prog.split()))
    argcomplete.autocomplete(parser, validator=lambda value, prefix: value.startswith(prefix))


def _config_names(prefix: str, **context: typing.Any) -> list[str]:
    return [*shipped_files(), *FilesCompleter(allowednames=(".py",))(prefix, **context)]


def _fields(prog: str) -> Iterator[str]:
    """Every dotted field of a command's config. Open maps, whose entries have no fixed names, end in a dot."""
    if prog.startswith("llmjax curate"):
        from llmjax.curate.config import Curation

        root: type = Curation
    else:
        from llmjax.run.config import RunConfig

        root = RunConfig

    def walk(cls: type, path: str) -> Iterator[str]:
        for name, hint in typing.get_type_hints(cls).items():
            options = list(families_of(hint).values()) or [hint]
            for option in options:
                if dataclasses.is_dataclass(option):
                    yield from walk(typing.cast(type, option), f"{path}{name}.")
                else:
                    entries = [inner for inner in typing.get_args(option) if dataclasses.is_dataclass(inner)]
                    yield f"{path}{name}." if entries else f"{path}{name}"

    yield from dict.fromkeys(walk(root, ""))
