"""Write TensorBoard events synchronously, without a background thread.

tensorboardX's SummaryWriter writes from its own thread: on a full disk that thread prints a traceback, and the caller
waits forever for its queue. Only its message types and its checksum are used here.
"""

from collections.abc import Mapping
import os
import pathlib
import socket
import struct
import time
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from llmjax import atomic


class EventFile:
    """One event file in `folder`. TensorBoard hides the events of earlier files from `purge_step` on.

    Raises OSError naming the file where the disk is full.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = atomic.AppendFile(folder / name)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event for each value."""
        for name, value in values.items():
            self._add(step=step, summary=scalar(name, value))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        """Append one event as a TFRecord: its length, the length's checksum, the event, its checksum."""
        event = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
        self._file.write(length + checksums[0] + event + checksums[1])
