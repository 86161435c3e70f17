"""Atomic file writes: a reader sees the old content or the new content, never a part."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
from typing import BinaryIO
import uuid

from etils import epath

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of a file


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in an object store, where a file is written in one piece and never appended to."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def name_in_errors(path: epath.PathLike) -> Iterator[None]:
    """Let an OSError that names no file, such as that of a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A local file to write and read, which is renamed to `path` when it is complete and on disk.

    The folder is created. An error leaves no file. An OSError, such as that of a full disk, names `path`.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename == str(partial) or (error.filename is None and error.errno in NO_SPACE):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


class AppendFile:
    """Appends to a local file without a buffer, so that no data remain unwritten when a write fails.

    Raises OSError naming the file, such as that of a full disk.
    """

    def __init__(self, path: epath.PathLike):
        self._path = os.fspath(path)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (open until `close`)

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            error.filename = self._path
            raise

    def sync(self) -> None:
        """Write the data to disk."""
        os.fsync(self._file.fileno())

    def still_exists(self) -> bool:
        """Whether the path still is this file, which was neither removed, renamed nor replaced."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file; the system writes the data to disk later, unless `sync` did."""
        self._file.close()


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Write a whole file, on disk or in an object store. The last of several writers wins."""
    if is_remote(path):
        epath.Path(path).write_bytes(data)  # an object appears when its upload is complete
        return
    with atomic_write(path) as file:
        file.write(data)


def remove_partial(folder: pathlib.Path) -> None:
    """Remove the partial files of killed writers in a folder, not in its subfolders."""
    for path in folder.glob("*.partial-*"):
        path.unlink(missing_ok=True)
