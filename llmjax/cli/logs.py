"""Where the log of a command goes: one handler on the logger "llmjax", which prints each message alone.

A record with `extra={"progress": True}` is a progress line: on a terminal it replaces the one before it, elsewhere it
is a line like any other.
"""

import logging
import shutil
import sys
from typing import Literal, TextIO

_LOGGER = logging.getLogger("llmjax")


class ConsoleHandler(logging.Handler):
    """Prints messages on the primary process. The stream is looked up for each record: tests and users replace it."""

    def __init__(self, stream: Literal["stdout", "stderr"]):
        super().__init__()
        self._stream_name = stream
        self._progress_is_drawn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record. Errors of the stream, such as a closed pipe, are those of the command."""
        if not _is_primary():
            return
        stream: TextIO = getattr(sys, self._stream_name)
        text = record.getMessage()
        if getattr(record, "progress", False) and stream.isatty():
            stream.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            self._progress_is_drawn = True
        else:
            stream.write(f"{self._end_of_progress()}{text}\n")
        stream.flush()

    def end_progress(self) -> None:
        """Leave the progress line as it stands and go to the next line, before something else is printed."""
        if self._progress_is_drawn:
            stream: TextIO = getattr(sys, self._stream_name)
            stream.write(self._end_of_progress())
            stream.flush()

    def _end_of_progress(self) -> str:
        drawn, self._progress_is_drawn = self._progress_is_drawn, False
        return "\n" if drawn else ""


def configure_logging(stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print what llmjax logs, from level INFO on, to `stream` ("stderr" where the results own stdout)."""
    for handler in [handler for handler in _LOGGER.handlers if isinstance(handler, ConsoleHandler)]:
        _LOGGER.removeHandler(handler)
    _LOGGER.addHandler(ConsoleHandler(stream))
    _LOGGER.setLevel(logging.INFO)
    if not logging.getLogger().handlers:  # absl, which Orbax uses, would add one that prints all of this a second time
        others = logging.StreamHandler()
        others.setLevel(logging.WARNING)
        others.addFilter(lambda record: not record.name.startswith("llmjax"))
        logging.getLogger().addHandler(others)


def end_progress() -> None:
    """End the progress line of every console handler, if one is drawn."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, ConsoleHandler):
            handler.end_progress()


def _is_primary() -> bool:
    """Whether this process is the one that prints; a process that has joined no job is its own primary."""
    if "jax" not in sys.modules:
        return True
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0
