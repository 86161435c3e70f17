"""`llmjax watch`: follow a run in the terminal."""

import signal
import sys
import time

from etils import epath

from llmjax.cli.flags import int_range, make_parser, parse_workdir
from llmjax.errors import UserError


def watch(arguments: list[str]) -> int:
    """Follow a run."""
    parser = make_parser(
        "watch",
        """\
        Show the state of a run from the files of its workdir: whether it is running, the loss curve, learning rate,
        tokens per second, time left, the last evaluation and samples. On a terminal the view is updated until Ctrl-C;
        elsewhere a new snapshot is printed when the last step changes. Any machine that sees the workdir can run
        it.""",
        "llmjax watch --workdir=runs/mine",
        overrides=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--once", action="store_true", help="print one snapshot and exit")
    parser.add_argument(
        "--every", type=int_range(1), default=5, metavar="SECONDS", help="interval between updates (default 5)"
    )
    flags = parser.parse_args(arguments)
    workdir = parse_workdir(flags.workdir)
    from llmjax.report import terminal

    snapshot = terminal.read(workdir)
    if not snapshot.metrics and (flags.once or not snapshot.is_running):
        raise UserError(
            f"{workdir}: no step was logged there yet; start the run with `llmjax train --workdir={flags.workdir}`, "
            "or wait for its first step"
        )
    if flags.once:
        _print(terminal.describe(snapshot))
        return 0
    try:
        (_redraw if sys.stdout.isatty() else _print_changes)(workdir, flags.every)
    except KeyboardInterrupt as stop:  # Ctrl-C is the normal end; other signals end the command as in other commands
        if getattr(stop, "number", signal.SIGINT) != signal.SIGINT:
            raise
    return 0


def _redraw(workdir: epath.Path, every: int) -> None:
    """Redraw the whole terminal every `every` seconds; at the end print the last view below the prompt."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from llmjax.report import terminal

    console, lines = Console(highlight=False), []
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                lines = terminal.describe(terminal.read(workdir), width=console.width)
                text = Text(
                    "\n".join([*lines, "", "Ctrl-C to leave; the run continues"]), no_wrap=True, overflow="crop"
                )
                text.stylize("bold", 0, len(lines[0]))
                live.update(text, refresh=True)
                time.sleep(every)
    finally:
        _print(lines)


def _print_changes(workdir: epath.Path, every: int) -> None:
    from llmjax.report import terminal

    printed = None
    while True:
        snapshot = terminal.read(workdir)
        if (state := (snapshot.step, snapshot.is_running, snapshot.eval_step)) != printed:
            _print([*terminal.describe(snapshot), ""])
            printed = state
        time.sleep(every)


def _print(lines: list[str]) -> None:
    """Print lines; characters that the output's encoding cannot represent become '?'."""
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(lines).encode(encoding, errors="replace").decode(encoding), flush=True)
