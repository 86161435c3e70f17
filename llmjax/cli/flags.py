"""What the commands share: argument parsing, config overrides, and errors in one line."""

import argparse
from collections.abc import Callable
import math
import os
import textwrap
import typing

from llmjax.errors import UserError

if typing.TYPE_CHECKING:
    from etils import epath

CONFIG = "a name that `llmjax configs` lists, or a Python file with get_config(); default: config.json of the workdir"


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError for a bad flag, as for every other bad input.

    completer   called in place of parsing when a shell requests completions; see llmjax.cli.completion
    """

    completer: typing.ClassVar[Callable[["Parser"], None] | None] = None
    takes_overrides = False

    def parse_args(self, *args: typing.Any, **named: typing.Any) -> typing.Any:
        """As in argparse; calls `completer` where there is one."""
        if Parser.completer:
            Parser.completer(self)
        return super().parse_args(*args, **named)

    def _get_value(self, action, arg_string):
        """As in argparse, but errors name flag and value: `--step=last: expected an integer of 0 or more`."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            self.error(f"argument {'/'.join(action.option_strings)}={arg_string}: {error.message}")

    def error(self, message: str) -> typing.NoReturn:
        """Raise UserError. The method of argparse would print the usage and exit."""
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


# Flags of the commands that join a job, and the variables that they set.
JOB_FLAGS = {
    "coordinator": "LLMJAX_COORDINATOR",
    "num_processes": "LLMJAX_NUM_PROCESSES",
    "process_id": "LLMJAX_PROCESS_ID",
}


def make_parser(command: str, description: str, example: str, *, overrides: bool = True, job: bool = False) -> Parser:
    """The parser of a command.

    overrides   whether the command takes `--config.FIELD=VALUE`, which `parse` reads
    job         whether the command joins a job of several processes, and takes JOB_FLAGS
    """
    fields = "\n\n--config.FIELD=VALUE sets any config field; `llmjax fields` lists them" if overrides else ""
    parser = Parser(
        prog=f"llmjax {command}",
        description=textwrap.dedent(description),
        epilog=f"example:\n  {example}{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.takes_overrides = overrides
    if job:
        group = parser.add_argument_group("job of several processes (Slurm steps and TPU slices need no flags)")
        group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; sets LLMJAX_COORDINATOR")
        group.add_argument("--num_processes", metavar="N", help="processes of the job; sets LLMJAX_NUM_PROCESSES")
        group.add_argument("--process_id", metavar="I", help="this process, from 0; sets LLMJAX_PROCESS_ID")
    return parser


def parse(parser: Parser, arguments: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and the `--config.FIELD=VALUE` overrides in order. JOB_FLAGS become environment variables."""
    plain, overrides, rest = [], [], iter(arguments)
    for argument in rest:
        if not argument.startswith("--config."):
            plain.append(argument)
            continue
        field, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals and (value := next(rest, None)) is None:
            raise UserError(f"{argument}: give a value, {argument}=VALUE")
        overrides.append((field, value))
    flags = parser.parse_args(plain)
    for flag, variable in JOB_FLAGS.items():
        if (value := getattr(flags, flag, None)) is not None:
            os.environ[variable] = value
    return flags, overrides


def parse_workdir(text: str) -> "epath.Path":
    """The path of `--workdir`. Raises UserError for an empty one and for a file."""
    from etils import epath

    if not text or os.path.isfile(os.path.expanduser(text)):
        raise UserError(f"--workdir={text}: {'this is a file' if text else 'empty'}; give a folder for the run's files")
    return epath.Path(os.path.expanduser(text))


def int_range(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The type of a flag: an integer from `least` to `most`."""
    expected = f"an integer of {least} or more" if most == math.inf else f"an integer from {least} to {most:.0f}"

    def parse_int(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}")
        return value

    return parse_int


def number(text: str) -> float:
    """The type of a flag: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError("expected a number")
    return value
