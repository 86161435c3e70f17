"""The log of a command: a handler on the logger "llmjax" that prints messages without level, time or name.

A record with `extra={"progress": True}` is a progress line. On a terminal it replaces the previous progress line;
elsewhere it is printed like any other line.
"""

import logging
import shutil
import sys
from typing import Literal, TextIO

_LOGGER = logging.getLogger("llmjax")


class ConsoleHandler(logging.Handler):
    """Prints messages on the primary process. It looks up the stream for each record, since tests replace it."""

    def __init__(self, stream: Literal["stdout", "stderr"]):
        super().__init__()
        self._stream_name = stream
        self._progress_is_drawn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record. Raises the errors of the stream, such as BrokenPipeError, which end the command."""
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
        """Keep the progress line and start a new one, before something else is printed."""
        if self._progress_is_drawn:
            stream: TextIO = getattr(sys, self._stream_name)
            stream.write(self._end_of_progress())
            stream.flush()

    def _end_of_progress(self) -> str:
        drawn, self._progress_is_drawn = self._progress_is_drawn, False
        return "\n" if drawn else ""


def configure_logging(stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print what llmjax logs, from level INFO on, to `stream` ("stderr" for commands that print results on stdout)."""
    for handler in [handler for handler in _LOGGER.handlers if isinstance(handler, ConsoleHandler)]:
        _LOGGER.removeHandler(handler)
    _LOGGER.addHandler(ConsoleHandler(stream))
    _LOGGER.setLevel(logging.INFO)
    if not logging.getLogger().handlers:  # else absl, which Orbax uses, adds one that prints everything a second time
        library_handler = logging.StreamHandler()
        library_handler.setLevel(logging.WARNING)
        library_handler.addFilter(lambda record: not record.name.startswith("llmjax"))
        logging.getLogger().addHandler(library_handler)


def end_progress() -> None:
    """End the progress line of every console handler, if one is drawn."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, ConsoleHandler):
            handler.end_progress()


def _is_primary() -> bool:
    """Whether this process prints. One that has joined no job does."""
    if "jax" not in sys.modules:
        return True
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0
