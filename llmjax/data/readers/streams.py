"""The bytes of a file, plain or compressed, as blocks, lines or a window, up to the last readable byte."""

import bz2
from collections.abc import Callable, Iterator
import lzma
import os
import re
from typing import Any
import zlib

BLOCK_BYTES = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b\x08"
# The first bytes of a file -> its compression. The second of zstd is a skippable frame, as pzstd writes first.
_MAGIC = (
    ("gzip", re.compile(rb"\x1f\x8b\x08")),
    ("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    ("xz", re.compile(rb"\xfd7zXZ\0")),
    ("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")),
)
# A compressed block of zstd has at least 4 bytes and expands to at most 128 KiB: a step expands to at most 64 MiB.
_ZSTD_STEP = 2048
_ZSTD_MAX_WINDOW = 1 << 31  # what `zstd --long=31` needs
_ZSTD_MAX_DICTIONARY = 1 << 24


class DamageError(Exception):
    """The rest of a file is unreadable; everything before it was yielded. The message is the cause in a few words.

    lost_bytes  content that is lost, estimated; for a file that ends early the whole file, since its length is unknown
    truncated   the file ends early, or the size of the missing part is unknown
    """

    def __init__(self, cause: str, lost_bytes: int = 0, truncated: bool = True):
        super().__init__(cause)
        self.lost_bytes, self.truncated = lost_bytes, truncated


def read_blocks(path: str, begin: int = 0) -> Iterator[bytes]:
    """The content of a file in blocks of bounded size, decompressed if its first bytes are those of a compression.

    A plain file is read from byte `begin` on. Raises DamageError after the last readable block of a truncated or
    corrupt file, and OSError if the disk or the permissions prevent reading.
    """
    compression = detect_compression(path) if not begin else ""
    file = _PushbackFile(path, begin)
    if not compression:
        yield from iter(file.read_block, b"")
        return
    num_bytes = 0
    try:
        for block in _DECOMPRESSORS[compression](file):
            num_bytes += len(block)
            yield block
    except DamageError as damage:
        position = max(file.position, 1)
        size = max(os.stat(path).st_size, position)
        # Before the end, the rest is estimated by the compression ratio so far.
        lost_bytes = num_bytes if position >= size else num_bytes * (size - position) // position
        cause = f"{damage} at byte {position:,} of {size:,}"
        raise DamageError(cause, max(lost_bytes, size - position, 1)) from None


def file_state(path: str) -> tuple[int, int] | None:
    """(modification time in ns, size) of a file, None if it does not exist. A cached result is valid while equal."""
    try:
        stat = os.stat(os.path.expanduser(path))
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def detect_compression(path: str) -> str:
    """ "gzip", "zstd", "xz", "bzip2" or "", by the first bytes of a file; "" if it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return match_compression(file.read(16))
    except OSError:
        return ""


def match_compression(head: bytes) -> str:
    """The compression that data begins with, or ""."""
    return next((name for name, magic in _MAGIC if magic.match(head)), "")


def read_gzip_segments(path: str) -> Iterator[Iterator[bytes]]:
    """The content of a .gz file as segments without a gap, each an iterator of blocks.

    A segment spans gzip members and raises DamageError at corrupt data. The next segment begins at the next member
    that can be decompressed. Read each segment to its end before the next.
    """
    file = _PushbackFile(path)
    while file.has_more():
        yield _read_gzip_segment(file)


class _PushbackFile:
    """A file read in blocks; unused bytes can be pushed back. `position` is that of the next byte."""

    def __init__(self, path: str, begin: int = 0):
        self._file, self._pushed_back, self.position = open(path, "rb"), b"", begin  # noqa: SIM115 (closed at its end)
        self._file.seek(begin)

    def read_block(self) -> bytes:
        block, self._pushed_back = self._pushed_back, b""
        if not block and not (block := b"" if self._file.closed else self._file.read(BLOCK_BYTES)):
            self._file.close()
        self.position += len(block)
        return block

    def push_back(self, data: bytes) -> None:
        self._pushed_back = data + self._pushed_back
        self.position -= len(data)

    def has_more(self) -> bool:
        self.push_back(self.read_block())
        return bool(self._pushed_back)


def _read_gzip_segment(file: _PushbackFile) -> Iterator[bytes]:
    """Blocks up to the end of the file or to corrupt data; the file is then at the next intact member."""
    begin, num_bytes = file.position, 0
    try:
        for block in _decompress_gzip(file):
            num_bytes += len(block)
            yield block
    except DamageError as damage:
        position = file.position
        _seek_gzip_member(file)
        num_skipped = file.position - position
        ratio = max(num_bytes / max(position - begin, 1), 1)
        # As in `read_blocks`: what is skipped is estimated by the compression ratio; an early end counts as a whole.
        lost_bytes = int(num_skipped * ratio) if num_skipped else num_bytes
        raise DamageError(str(damage), max(lost_bytes, 1)) from None


def _decompress_gzip(file: _PushbackFile) -> Iterator[bytes]:
    while file.has_more():
        member, is_empty = zlib.decompressobj(31), True
        while not member.eof:
            block = member.unconsumed_tail or file.read_block()
            # zlib returns nothing from a call that meets corrupt data: decompress what precedes it with a copy.
            checkpoint = member.copy()
            try:
                data = member.decompress(block, BLOCK_BYTES)
            except zlib.error as error:
                data, num_used = _decompress_intact(checkpoint, block)
                if data:
                    yield data
                if is_empty and not data and not any(block):
                    return  # zeros after the last member are padding
                file.push_back(block[max(num_used, 1) :])
                raise DamageError(f"corrupt gzip data ({error})") from None
            if not block and not data:
                raise DamageError("the file ends inside a gzip member")
            is_empty = False
            if data:
                yield data
        file.push_back(member.unused_data)


def _decompress_intact(member: Any, block: bytes) -> tuple[bytes, int]:
    """(content, number of compressed bytes) of the intact beginning of a block, found by bisection."""
    content, num_used, step = [], 0, len(block)
    while step:
        trial = member.copy()
        try:
            content.append(trial.decompress(block[num_used : num_used + step]))
        except zlib.error:
            step //= 2
            continue
        member, num_used = trial, num_used + step
    return b"".join(content), num_used


def _seek_gzip_member(file: _PushbackFile) -> None:
    """Move to the next gzip member whose beginning can be decompressed, or to the end of the file."""
    data = file.read_block()
    while True:
        begin = data.find(_GZIP_MAGIC)
        if begin < 0:
            more = file.read_block()
            if not more:
                return
            data = data[-2:] + more
            continue
        data = data[begin:]
        while len(data) < 4096 and (more := file.read_block()):
            data += more
        try:
            if zlib.decompressobj(31).decompress(data[:4096], 64):
                file.push_back(data)
                return
        except zlib.error:
            pass
        data = data[1:]


def _decompress_zstd(file: _PushbackFile) -> Iterator[bytes]:
    import zstandard

    dictionary = zstandard.ZstdCompressionDict(_read_zstd_dictionary(file))
    new = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=_ZSTD_MAX_WINDOW).decompressobj
    frame, inside_frame = new(), False
    while block := file.read_block():
        for begin in range(0, len(block), _ZSTD_STEP):
            step = block[begin : begin + _ZSTD_STEP]
            while step:
                frame = new() if frame.eof else frame
                try:
                    data = frame.decompress(step)
                except zstandard.ZstdError as error:
                    file.push_back(step + block[begin + _ZSTD_STEP :])
                    raise DamageError(f"corrupt zstd data ({error})") from None
                if data:
                    yield data
                step, inside_frame = (frame.unused_data, False) if frame.eof else (b"", True)
    if inside_frame:
        raise DamageError("the file ends inside a zstd frame")


def _read_zstd_dictionary(file: _PushbackFile) -> bytes:
    """The dictionary of a .warc.zst file, in its first, skippable frame; b"" without one.

    Source: IIPC, "Zstandard Compression of WARC files", version 1.0. The dictionary itself may be compressed.
    """
    import zstandard

    head, size = file.read_block(), 0
    if head.startswith(b"\x5d\x2a\x4d\x18"):
        size = min(int.from_bytes(head[4:8], "little"), _ZSTD_MAX_DICTIONARY)
        while len(head) < 8 + size and (block := file.read_block()):
            head += block
    file.push_back(head)
    dictionary = head[8 : 8 + size]
    if dictionary.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            return zstandard.ZstdDecompressor().decompressobj().decompress(dictionary)
        except zstandard.ZstdError:
            return b""
    return dictionary


def _decompress_xz_or_bzip2(file: _PushbackFile, new_stream: Callable[[], Any], name: str) -> Iterator[bytes]:
    """Both decompressors have one interface. Zeros between and after streams are padding."""
    while file.has_more():
        stream = new_stream()
        while not stream.eof:
            block = file.read_block() if stream.needs_input else b""
            if not block and stream.needs_input:
                raise DamageError(f"the file ends inside {name} data")
            try:
                data = stream.decompress(block, BLOCK_BYTES)
            except (lzma.LZMAError, OSError, EOFError) as error:
                file.push_back(block)
                raise DamageError(f"corrupt {name} data ({error})") from None
            if data:
                yield data
        rest = stream.unused_data.lstrip(b"\0")
        while not rest and (rest := file.read_block()):
            rest = rest.lstrip(b"\0")
            if not rest and not file.has_more():
                return
        file.push_back(rest)


_DECOMPRESSORS: dict[str, Callable[[_PushbackFile], Iterator[bytes]]] = {
    "gzip": _decompress_gzip,
    "zstd": _decompress_zstd,
    "xz": lambda file: _decompress_xz_or_bzip2(file, lzma.LZMADecompressor, "xz"),
    "bzip2": lambda file: _decompress_xz_or_bzip2(file, bz2.BZ2Decompressor, "bzip2"),
}


class UntilDamage:
    """Blocks up to DamageError, which `check` raises later, after the blocks before it were used."""

    def __init__(self, data: Iterator[bytes]):
        self._data, self.damage = data, None

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._data
        except DamageError as damage:
            self.damage = damage

    def check(self) -> None:
        """Raise the DamageError that ended the blocks, if any."""
        if self.damage:
            raise self.damage


def split_lines(
    data: Iterator[bytes], offset: int = 0, *, max_bytes: int, lone_cr: bool = False
) -> Iterator[tuple[int, bytes | int]]:
    """(offset, line with its line end) for every line; its number of bytes in place of a line above `max_bytes`.

    offset   of the first byte
    lone_cr  a CR without LF ends a line too
    A line that DamageError cuts off is not yielded.
    """
    parts, size = [], 0
    for block in _join_line_ends(data) if lone_cr else data:
        pieces = block.splitlines(keepends=True) if lone_cr else block.split(b"\n")
        if lone_cr and pieces[-1][-1:] in b"\r\n":
            pieces.append(b"")
        line_end = b"" if lone_cr else b"\n"
        for piece in pieces[:-1]:
            size += len(piece) + len(line_end)
            if size > max_bytes:
                yield offset, size
            elif parts:
                yield offset, b"".join((*parts, piece, line_end))
            else:
                yield offset, piece + line_end
            offset, parts, size = offset + size, [], 0
        size += len(pieces[-1])
        if size <= max_bytes:
            parts.append(pieces[-1])
        else:
            parts = []
    if size:
        yield offset, b"".join(parts) if size <= max_bytes else size


def find_line_begin(path: str, position: int, end: int | None) -> int | None:
    """The offset after the first line feed at or after `position` in a plain file; None if there is none before `end`.

    The search stops there, so that many spans of one long line are not all read to its end.
    """
    for block in read_blocks(path, position):
        if (at := block.find(b"\n")) >= 0:
            return position + at + 1
        position += len(block)
        if end is not None and position >= end:
            break
    return None


def _join_line_ends(data: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that do not separate CR from LF."""
    last = b""
    for block in data:
        block, last = last + block, b""
        if block.endswith(b"\r"):
            block, last = block[:-1], b"\r"
        if block:
            yield block
    if last:
        yield last


class Window:
    """A stream of blocks with lookahead. It ends at DamageError, which is then in `damage`."""

    def __init__(self, data: Iterator[bytes]):
        self._data, self._buffer = data, bytearray()
        self.damage: DamageError | None = None

    def peek(self, size: int) -> bytearray:
        """The stream from here on: at least `size` bytes, or all that are left."""
        while len(self._buffer) < size and self._fill():
            pass
        return self._buffer

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end."""
        self.peek(size)
        data = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return data

    def skip(self, size: int) -> None:
        """Pass over `size` bytes, or fewer at the end, in bounded memory."""
        while size > 0 and (num_read := len(self.read(min(size, BLOCK_BYTES)))):
            size -= num_read

    def skip_to(self, marker: bytes) -> int:
        """Move to the next `marker`, or to the end. Returns the number of bytes that were skipped."""
        num_skipped = 0
        while True:
            at = self._buffer.find(marker)
            count = at if at >= 0 else max(len(self._buffer) - len(marker) + 1, 0)
            del self._buffer[:count]
            num_skipped += count
            if at >= 0:
                return num_skipped
            if not self._fill():
                num_skipped += len(self._buffer)
                self._buffer.clear()
                return num_skipped

    def _fill(self) -> bool:
        try:
            block = next(self._data, b"")
        except DamageError as damage:
            self.damage, block = damage, b""
        self._buffer += block
        return bool(block)
