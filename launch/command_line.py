"""What the launchers in Python share of their command lines: `LAUNCHER FLAGS -- COMMAND`."""

import argparse
import sys
from typing import NoReturn

from restarts import BAD_INPUT


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad flag in one line with status 78, as llmjax does; `prog` is the launcher's path."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_INPUT)

    def parse_job(self, arguments: list[str], runner: str) -> argparse.Namespace:
        """The options, with `command` as the list of what `runner`, such as "every process", runs."""
        self.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help=f"what {runner} runs")
        options = self.parse_args(arguments)
        if options.command[:1] == ["--"]:
            del options.command[0]
        if not options.command:
            self.error("the command is missing; put it after --, such as: -- llmjax train --config=... --workdir=...")
        return options


def positive(text: str) -> int:
    """The type of a flag: an integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return int(text)


def count(text: str) -> int:
    """The type of a flag: an integer."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return int(text)
