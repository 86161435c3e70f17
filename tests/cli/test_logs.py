"""The console handler: plain messages on one stream, progress redrawn on a terminal, only on process 0."""

import io
import logging
import sys

import jax
import pytest

from llmjax.cli import logs

logger = logging.getLogger("llmjax.tests")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _without_handler():
    yield
    root = logging.getLogger("llmjax")
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_messages_are_printed_without_level_name_or_line_breaks(capsys, caplog, name):
    logs.configure_logging("stdout")
    logs.configure_logging(name)  # takes the place of the first handler
    logger.info("%s is %d", "x" * 500, 5)
    out, err = capsys.readouterr()
    used, other = (out, err) if name == "stdout" else (err, out)
    assert (used, other) == (f"{'x' * 500} is 5\n", "")
    assert caplog.messages, "the logger passes records on"


def test_progress_is_an_ordinary_line_without_a_terminal(capsys):
    logs.configure_logging()
    logger.info("a", extra={"progress": True})
    logger.info("b", extra={"progress": True})
    logger.info("c")
    assert capsys.readouterr().out == "a\nb\nc\n"


def test_progress_is_redrawn_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "11")
    logs.configure_logging()
    logger.info("first", extra={"progress": True})
    logger.info("second, longer", extra={"progress": True})
    logger.info("a message, which is never cut")
    logger.info("third", extra={"progress": True})
    logs.end_progress()
    logs.end_progress()
    assert screen.getvalue() == ("\r\x1b[Kfirst\r\x1b[Ksecond, lo\na message, which is never cut\n\r\x1b[Kthird\n")


def test_only_the_primary_process_prints(capsys, monkeypatch):
    logs.configure_logging()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        logger.info("from process %d", process)
    assert capsys.readouterr().out == "from process 0\n"


def test_a_closed_pipe_raises_broken_pipe_error(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    logs.configure_logging()
    with pytest.raises(BrokenPipeError):
        logger.info("nobody reads this")
