"""Write TensorBoard events synchronously, without a background thread and without a package.

The packages that write them import PyTorch or TensorFlow where these are installed, which takes seconds. Their writers
run in threads: on a full disk such a thread prints a traceback, and the caller waits forever for its queue.
"""

from collections.abc import Mapping
import os
import pathlib
import socket
import struct
import time

import numpy as np

from llmjax import atomic


class EventFile:
    """One event file in `folder`. TensorBoard hides the events of earlier files from `purge_step` on.

    Raises OSError naming the file where the disk is full.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = atomic.AppendFile(folder / name)
        # Fields of the message Event, in TensorFlow's event.proto: 2 step, 3 file_version, 5 summary, 7 session_log.
        self._add(_bytes(3, b"brain.Event:2"))
        self._add(_integer(2, purge_step) + _bytes(7, _integer(1, 1)))  # SessionLog.status = START

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event for each value."""
        for name, value in values.items():
            with np.errstate(over="ignore"):
                simple_value = b"\x15" + np.float32(value).astype("<f4").tobytes()  # field 2 of Summary.Value
            self._add(_integer(2, step) + _bytes(5, _bytes(1, _bytes(1, name.encode()) + simple_value)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, fields: bytes) -> None:
        """Append one event as a TFRecord: its length, the length's checksum, the event, its checksum."""
        event = b"\x09" + struct.pack("<d", time.time()) + fields  # field 1: wall_time
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
        self._file.write(length + checksums[0] + event + checksums[1])


def _varint(value: int) -> bytes:
    """An integer from 0 on, as protocol buffers write it: 7 bits a byte, the lowest first."""
    digits = []
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _integer(field: int, value: int) -> bytes:
    """An integer field of a message."""
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    """A field of bytes, text or another message."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _crc32c_table() -> list[int]:
    """The CRC-32C of each byte."""
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_TABLE = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecords: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
