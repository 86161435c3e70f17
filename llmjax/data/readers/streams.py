"""The bytes of a file, plain or compressed, as blocks, lines or a window, up to the last readable byte."""

import bz2
from collections.abc import Callable, Iterator
import lzma
import os
import re
import zlib

BLOCK = 1 << 18
MAX_RECORD = 1 << 26  # bytes; the default limit on a record, so that memory stays bounded
_GZIP_MAGIC = b"\x1f\x8b\x08"
# The first bytes of a file -> its compression. The second of zstd is a skippable frame, as pzstd writes first.
_MAGIC = (
    ("gzip", re.compile(rb"\x1f\x8b\x08")),
    ("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    ("xz", re.compile(rb"\xfd7zXZ\0")),
    ("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")),
)
# A block of zstd has at least 4 bytes and gives at most 128 KiB, so that a step of this size gives at most 64 MiB.
_ZSTD_STEP = 2048
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` needs


class Damage(Exception):
    """The rest of a file cannot be read; everything before it was given. The text says why, in a few words.

    lost       bytes of content that are lost, estimated; a file that ends early counts whole, as nobody knows more
    truncated  the end of the file is missing, or what is missing cannot be measured
    """

    def __init__(self, why: str, lost: int = 0, truncated: bool = True):
        super().__init__(why)
        self.lost, self.truncated = lost, truncated


def blocks(path: str, begin: int = 0) -> Iterator[bytes]:
    """The content of a file from byte `begin` on (of a plain file), unpacked by its first bytes, in bounded blocks.

    Raises Damage after the last block that could be read, where the file is truncated or broken, and OSError where the
    disk or its permissions do not let it be read: that is no property of the file.
    """
    compression = compression_of(path) if not begin else ""
    source = _Source(path, begin)
    if not compression:
        yield from iter(source.next, b"")
        return
    given = 0
    try:
        for block in _DECOMPRESSORS[compression](source):
            given += len(block)
            yield block
    except Damage as damage:
        at = max(source.offset, 1)
        size = max(os.stat(path).st_size, at)
        # At the end nobody knows what is missing: the file counts whole. Before it, by the ratio up to the break.
        lost = given if at >= size else given * (size - at) // at
        raise Damage(f"{damage} at byte {at:,} of {size:,}", max(lost, size - at, 1)) from None


def state_of(path: str) -> tuple[int, int] | None:
    """Time of change and size of a file, None where there is none: what was read of it holds while they do."""
    try:
        stat = os.stat(os.path.expanduser(path))
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def compression_of(path: str) -> str:
    """ "gzip", "zstd", "xz", "bzip2" or "", by the first bytes of a file; "" where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return ""
    return next((name for name, magic in _MAGIC if magic.match(head)), "")


def gzip_stretches(path: str) -> Iterator[Iterator[bytes]]:
    """The unpacked content of a .gz file as iterators of blocks, each one contiguous.

    A stretch goes on over the edges of gzip members and raises Damage where the data breaks off; the next stretch
    begins at the next member that can be unpacked. Each must be read to its end before the next is asked for.
    """
    source = _Source(path)
    while source.more():
        yield _gzip_stretch(source)


class _Source:
    """A file in blocks of which the unread part can be put back; `offset` is that of the next byte."""

    def __init__(self, path: str, begin: int = 0):
        self._file, self._held, self.offset = open(path, "rb"), b"", begin  # noqa: SIM115 (closed at its end)
        self._file.seek(begin)

    def next(self) -> bytes:
        block, self._held = self._held, b""
        if not block and not (block := b"" if self._file.closed else self._file.read(BLOCK)):
            self._file.close()
        self.offset += len(block)
        return block

    def put_back(self, data: bytes) -> None:
        self._held = data + self._held
        self.offset -= len(data)

    def more(self) -> bool:
        self.put_back(self.next())
        return bool(self._held)


def _gzip_stretch(source: _Source, seek: bool = True) -> Iterator[bytes]:
    while source.more():
        member, out = zlib.decompressobj(31), False
        while not member.eof:
            block = member.unconsumed_tail or source.next()
            if not block and not (drained := member.decompress(b"", BLOCK)):
                raise Damage("the file ends inside a gzip member")
            # zlib gives nothing of a call that meets a break: a copy made before reads again what precedes it.
            before = member.copy()
            try:
                data = member.decompress(block, BLOCK) if block else drained
            except zlib.error as error:
                data, used = _before_break(before, block)
                if data:
                    yield data
                if not out and not data and not any(block):
                    return  # zeros after the last member are padding
                source.put_back(block[max(used, 1) :])
                if seek:
                    _seek_member(source)
                raise Damage(f"broken gzip data ({error})") from None
            out = True
            if data:
                yield data
        source.put_back(member.unused_data)


def _before_break(member, block: bytes) -> tuple[bytes, int]:
    """(content, bytes used) of the part of a block that precedes the break, found by halving."""
    content, used, step = [], 0, len(block)
    while step:
        trial = member.copy()
        try:
            content.append(trial.decompress(block[used : used + step]))
        except zlib.error:
            step //= 2
            continue
        member, used = trial, used + step
    return b"".join(content), used


def _seek_member(source: _Source) -> None:
    """Leave the source at the next member that begins to unpack, or at its end."""
    data = source.next()
    while True:
        at = data.find(_GZIP_MAGIC)
        if at < 0:
            more = source.next()
            if not more:
                return
            data = data[-2:] + more
            continue
        data = data[at:]
        while len(data) < 4096 and (more := source.next()):
            data += more
        try:
            if zlib.decompressobj(31).decompress(data[:4096], 64):
                source.put_back(data)
                return
        except zlib.error:
            pass
        data = data[1:]


def _zstd_blocks(source: _Source) -> Iterator[bytes]:
    import zstandard

    new = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
    frame, inside = new(), False
    while block := source.next():
        for begin in range(0, len(block), _ZSTD_STEP):
            step = block[begin : begin + _ZSTD_STEP]
            while step:
                frame = new() if frame.eof else frame
                try:
                    data = frame.decompress(step)
                except zstandard.ZstdError as error:
                    source.put_back(block[begin:])
                    raise Damage(f"broken zstd data ({error})") from None
                if data:
                    yield data
                step, inside = (frame.unused_data, False) if frame.eof else (b"", True)
    if inside:
        raise Damage("the file ends inside a zstd frame")


def _stream_blocks(source: _Source, new: Callable, name: str) -> Iterator[bytes]:
    """xz and bzip2, whose decompressors have one interface. Zeros between and after streams are padding."""
    while source.more():
        stream = new()
        while not stream.eof:
            block = source.next() if stream.needs_input else b""
            if not block and stream.needs_input:
                raise Damage(f"the file ends inside {name} data")
            try:
                data = stream.decompress(block, BLOCK)
            except (lzma.LZMAError, OSError, EOFError) as error:
                source.put_back(block)
                raise Damage(f"broken {name} data ({error})") from None
            if data:
                yield data
        rest = stream.unused_data.lstrip(b"\0")
        while not rest and (rest := source.next()):
            rest = rest.lstrip(b"\0")
            if not rest and not source.more():
                return
        source.put_back(rest)


_DECOMPRESSORS: dict[str, Callable[[_Source], Iterator[bytes]]] = {
    "gzip": lambda source: _gzip_stretch(source, seek=False),
    "zstd": _zstd_blocks,
    "xz": lambda source: _stream_blocks(source, lzma.LZMADecompressor, "xz"),
    "bzip2": lambda source: _stream_blocks(source, bz2.BZ2Decompressor, "bzip2"),
}


class UntilDamage:
    """Blocks up to Damage, which is kept, to be raised by `check` after what precedes it was used."""

    def __init__(self, data: Iterator[bytes]):
        self._data, self.damage = data, None

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._data
        except Damage as damage:
            self.damage = damage

    def check(self) -> None:
        if self.damage:
            raise self.damage


def lines(
    data: Iterator[bytes], offset: int = 0, limit: int = MAX_RECORD, lone_cr: bool = False
) -> Iterator[tuple[int, bytes | int]]:
    """(offset, line with its end) for every line; its number of bytes in place of a line longer than `limit`.

    offset   of the first byte
    lone_cr  a CR alone ends a line too
    Where Damage ends the data, the line that it cuts is not given.
    """
    held, size = [], 0
    for block in _whole_line_ends(data) if lone_cr else data:
        pieces = block.splitlines(keepends=True) if lone_cr else block.split(b"\n")
        if lone_cr and pieces[-1][-1:] in b"\r\n":
            pieces.append(b"")
        end = b"" if lone_cr else b"\n"
        for piece in pieces[:-1]:
            size += len(piece) + len(end)
            if size > limit:
                yield offset, size
            elif held:
                yield offset, b"".join((*held, piece, end))
            else:
                yield offset, piece + end
            offset, held, size = offset + size, [], 0
        size += len(pieces[-1])
        if size <= limit:
            held.append(pieces[-1])
        else:
            held = []
    if size:
        yield offset, b"".join(held) if size <= limit else size


def _whole_line_ends(data: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that part no CR from its LF."""
    held = b""
    for block in data:
        block, held = held + block, b""
        if block.endswith(b"\r"):
            block, held = block[:-1], b"\r"
        if block:
            yield block
    if held:
        yield held


class Window:
    """A stream of blocks that can be looked at before it is taken. After Damage it ends; `damage` says why."""

    def __init__(self, data: Iterator[bytes]):
        self._data, self._held, self.damage = data, bytearray(), ""

    def look(self, size: int) -> bytearray:
        """The stream from here on: `size` bytes or more, or all there are."""
        while len(self._held) < size and self._pull():
            pass
        return self._held

    def take(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end."""
        self.look(size)
        taken = bytes(memoryview(self._held)[:size])
        del self._held[:size]
        return taken

    def skip_to(self, marker: bytes) -> int:
        """Go to the next `marker`, or to the end; returns the number of bytes passed over."""
        passed = 0
        while True:
            at = self._held.find(marker)
            gone = at if at >= 0 else max(len(self._held) - len(marker) + 1, 0)
            del self._held[:gone]
            passed += gone
            if at >= 0:
                return passed
            if not self._pull():
                passed += len(self._held)
                self._held.clear()
                return passed

    def _pull(self) -> bool:
        try:
            block = next(self._data, b"")
        except Damage as error:
            self.damage, block = str(error), b""
        self._held += block
        return bool(block)
