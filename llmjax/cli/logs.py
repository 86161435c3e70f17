"""Log lines of a command: the message alone, on process 0."""

import logging
import sys
from typing import TextIO


class _PrimaryHandler(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        from llmjax.parallel import hosts

        if hosts.is_primary():
            super().emit(record)


def configure_logging(stream: TextIO | None = None) -> None:
    """Write what llmjax's modules log to `stream` (default: stdout), in place of an earlier stream."""
    logger = logging.getLogger("llmjax")
    logger.setLevel(logging.INFO)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _PrimaryHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_PrimaryHandler(stream or sys.stdout))
