"""Read files that are compared with the checksums of their blocks as they are read."""

import os
from pathlib import Path
import threading
from typing import BinaryIO
import zlib

import numpy as np

from llmjax.errors import UserError

BLOCK_BYTES = 1 << 20  # checksums are kept by block, so that the first read of a file need not read all of it


def block_checksums(file: BinaryIO) -> str:
    """CRC-32 of each block of an open file, 8 hex digits each."""
    file.seek(0)
    return "".join(f"{zlib.crc32(block):08x}" for block in iter(lambda: file.read(BLOCK_BYTES), b""))


class CheckedFile:
    """Random access to a file, every byte of which is compared with a checksum before it is returned.

    The first read of a block compares its checksum, and so does the next read after the file was written to. A write
    through a memory map that another process held before the first read is not noticed, since the kernel then leaves
    the time of the last write unchanged. The file is read, not mapped: touching a mapping of a truncated file kills
    the process (SIGBUS). Threads may read at once. Damage raises UserError.

    path          the file; opened by the first read
    name          what the file is called in errors, such as "token shard"
    size          bytes
    block_crc32   from `block_checksums`
    hint          how to fix damage, for errors
    """

    def __init__(self, path: Path, *, name: str, size: int, block_crc32: str, hint: str):
        self.size = size
        self._path, self._name, self._hint, self._block_crc32 = path, name, hint, block_crc32
        self._file: _OpenFile | None = None
        # (state of the file, which of its blocks were compared since it had that state); survives `close`.
        self._checked: tuple[tuple[int, ...], np.ndarray] | None = None
        self._lock = threading.Lock()

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end)."""
        file = self._file or self._open()
        while True:
            state, verified = self._checked or self._reset(file)
            for block in range(start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1):
                if not verified[block]:
                    self._verify_block(file, block)
                    verified[block] = True
            data = file.read(start, end)
            # Compared after reading: a write to the file before it was read has changed its state by now.
            if file.state() == state:
                return data
            self._reset(file)

    def verify(self) -> None:
        """Compare the checksums of all blocks."""
        file = self._file or self._open()
        for block in range(len(self._reset(file)[1])):
            self._verify_block(file, block)

    def close(self) -> None:
        """Release the file descriptor; the next read opens the file again."""
        self._file = None

    def _open(self) -> "_OpenFile":
        with self._lock:
            if (file := self._file) is None:
                try:
                    file = _OpenFile(self._path)
                except OSError as error:
                    message = f"{self._name} {self._path} cannot be read ({error.strerror}); {self._hint}"
                    raise UserError(message) from None
                self._file = file
            return file

    def _reset(self, file: "_OpenFile") -> tuple[tuple[int, ...], np.ndarray]:
        """Record the file's state, with no block compared yet, and return the record. Raises UserError for another
        size."""
        state = file.state()
        if state[2] != self.size:
            raise UserError(
                f"{self._name} {self._path} has {state[2]} bytes, expected {self.size}: it was truncated or written "
                f"to while it was in use; {self._hint}"
            )
        self._checked = state, np.zeros(-(-self.size // BLOCK_BYTES), bool)
        return self._checked

    def _verify_block(self, file: "_OpenFile", block: int) -> None:
        start, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size)
        expected = int(self._block_crc32[8 * block : 8 * block + 8], 16)
        if zlib.crc32(file.read(start, end)) != expected:
            raise UserError(
                f"{self._name} {self._path} is damaged between bytes {start} and {end}: checksum differs from the "
                f"manifest; {self._hint}"
            )


class _OpenFile:
    """A file descriptor, closed with its last reader, which may be in another thread than the one that opened it."""

    def __init__(self, path: Path):
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end); fewer where the file ends."""
        data = os.pread(self._descriptor, end - start, start)
        while len(data) < end - start and (
            more := os.pread(self._descriptor, end - start - len(data), start + len(data))
        ):
            data += more
        return data

    def state(self) -> tuple[int, ...]:
        """What changes when the file is written to in place: (device, inode, bytes, time of the last write in ns)."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def __del__(self, close=os.close):  # bound here, since modules are emptied before the interpreter exits
        if self._descriptor >= 0:
            close(self._descriptor)
