"""What the commands share: argument parsing, config overrides, and errors in one line."""

import argparse
from collections.abc import Callable
import math
import os
import textwrap
import typing

from llmjax.errors import UserError

CONFIG = "a name of `llmjax configs`, or a Python file with get_config(); may be left out where a workdir has a config"


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is a UserError: one line, like every other bad input.

    completer   answers a shell that asks what may follow, in place of parsing; see llmjax.cli.completion
    """

    completer: typing.ClassVar[Callable[["Parser"], None] | None] = None
    takes_overrides = False

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        if Parser.completer:
            Parser.completer(self)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


def make_parser(command: str, description: str, example: str, *, overrides: bool = True) -> Parser:
    """The parser of a command; `overrides` says whether it takes config overrides, as `parse` reads them."""
    fields = "\n\n--config.FIELD=VALUE sets any config field; `llmjax fields` lists them" if overrides else ""
    parser = Parser(
        prog=f"llmjax {command}",
        description=textwrap.dedent(description),
        epilog=f"example:\n  {example}{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.takes_overrides = overrides
    return parser


def parse(parser: Parser, arguments: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and the `--config.FIELD=VALUE` overrides in order."""
    plain, overrides, waiting = [], [], iter(arguments)
    for argument in waiting:
        if not argument.startswith("--config."):
            plain.append(argument)
            continue
        field, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals and (value := next(waiting, None)) is None:
            raise UserError(f"{argument}: give a value, {argument}=VALUE")
        overrides.append((field, value))
    return parser.parse_args(plain), overrides


def parse_workdir(text: str):
    from etils import epath

    if not text or os.path.isfile(os.path.expanduser(text)):
        raise UserError(f"--workdir={text}: {'this is a file' if text else 'empty'}; give a folder for the run's files")
    return epath.Path(os.path.expanduser(text))


def say(line: str) -> None:
    """Print on process 0 alone."""
    from llmjax.parallel import hosts

    if hosts.is_primary():
        print(line, flush=True)


def int_range(least: int, most: float = math.inf) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    whole_number.__name__ = f"integer, {least} {'or more' if most == math.inf else f'to {most}'}"
    return whole_number
