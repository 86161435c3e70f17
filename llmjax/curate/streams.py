"""The bytes of a file, plain or compressed, up to the last one that can be read, in blocks and in lines."""

from collections.abc import Iterable, Iterator
import os
import zlib

BLOCK = 1 << 18
MAX_RECORD = 1 << 26  # bytes; a longer record is refused, so that memory stays bounded
_GZIP_MAGIC = b"\x1f\x8b\x08"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Damage(Exception):
    """The rest of a file cannot be read; everything before it was given. The text says why, in a few words."""


def blocks(path: str, begin: int = 0) -> Iterator[bytes]:
    """The content of a file from byte `begin` on (of a plain file), gzip and zstd unpacked, told by their first bytes.

    Raises Damage after the last block that could be read, where the file is truncated or broken, and OSError where the
    disk or its permissions do not let it be read: that is no property of the file.
    """
    packing = packing_of(path) if not begin else ""
    if packing == "gzip":
        for number, member in enumerate(gzip_stretches(path)):
            if number:  # a stretch that follows damage
                return
            yield from member
    elif packing == "zstd":
        yield from _zstd_blocks(_raw_blocks(path))
    else:
        yield from _raw_blocks(path, begin)


def state_of(path: str) -> tuple[int, int] | None:
    """Time of change and size of a file, None where there is none: what was read of it holds while they do."""
    try:
        stat = os.stat(os.path.expanduser(path))
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def packing_of(path: str) -> str:
    """ "gzip", "zstd" or "", by the first bytes of a file; "" where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError:
        return ""
    return "gzip" if head.startswith(_GZIP_MAGIC) else "zstd" if head == _ZSTD_MAGIC else ""


def gzip_stretches(path: str) -> Iterator[Iterator[bytes]]:
    """The unpacked content of a .gz file as iterators of blocks, each one contiguous.

    A stretch goes on over the edges of gzip members and raises Damage where the data breaks off; the next stretch
    begins at the next member that can be unpacked. Each must be read to its end before the next is asked for.
    """
    source = _Rereadable(_raw_blocks(path))
    while source.more():
        yield _gzip_stretch(source)


class _Rereadable:
    """Raw blocks of which the unread part can be put back."""

    def __init__(self, raw: Iterator[bytes]):
        self._raw, self._held = raw, b""

    def next(self) -> bytes:
        held, self._held = self._held, b""
        return held or next(self._raw, b"")

    def put_back(self, data: bytes) -> None:
        self._held = data + self._held

    def more(self) -> bool:
        self._held = self._held or next(self._raw, b"")
        return bool(self._held)


def _gzip_stretch(source: _Rereadable) -> Iterator[bytes]:
    while source.more():
        member, out = zlib.decompressobj(31), False
        while not member.eof:
            block = source.next()
            if not block:
                raise Damage("the file ends inside a gzip member")
            # zlib gives nothing of a block that breaks: a copy made before reads again what precedes the break.
            before = member.copy()
            try:
                data = member.decompress(block)
            except zlib.error as error:
                data, used = _before_break(before, block)
                if data:
                    yield data
                if not out and not data and not any(block):
                    return  # zeros after the last member are padding
                _seek_member(source, block[max(used, 1) :])
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


def _seek_member(source: _Rereadable, data: bytes) -> None:
    """Leave the source at the next member that begins to unpack, or at its end."""
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


def _zstd_blocks(raw: Iterable[bytes]) -> Iterator[bytes]:
    import zstandard

    new = zstandard.ZstdDecompressor().decompressobj
    frame, inside = new(), False
    for block in raw:
        # Small steps, since the library gives nothing of a step that breaks.
        for begin in range(0, len(block), 1 << 14):
            step = block[begin : begin + (1 << 14)]
            while step:
                frame = new() if frame.eof else frame
                try:
                    data = frame.decompress(step)
                except zstandard.ZstdError as error:
                    raise Damage(f"broken zstd data ({error})") from None
                if data:
                    yield data
                step, inside = (frame.unused_data, False) if frame.eof else (b"", True)
    if inside:
        raise Damage("the file ends inside a zstd frame")


def _raw_blocks(path: str, begin: int = 0) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(begin)
        while block := file.read(BLOCK):
            yield block


def lines(data: Iterator[bytes], offset: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line with its end) for every line; None for the line where it is longer than MAX_RECORD.

    offset   of the first byte. The part of a line that precedes Damage is given before Damage is raised.
    """
    held, size, damage = [], 0, None
    while damage is None:
        try:
            block = next(data, b"")
        except Damage as error:
            damage, block = error, b""
        if not block:
            break
        pieces = block.split(b"\n")
        for piece in pieces[:-1]:
            held.append(piece)
            size += len(piece) + 1
            yield offset, b"".join(held) + b"\n" if size <= MAX_RECORD else None
            offset, held, size = offset + size, [], 0
        size += len(pieces[-1])
        if size <= MAX_RECORD:
            held.append(pieces[-1])
        else:
            held = []
    if size:
        yield offset, b"".join(held) if size <= MAX_RECORD else None
    if damage:
        raise damage


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
