"""Captured pages of WARC and ARC files, by a reader that goes on after damage.

Formats: ISO 28500 (WARC 1.0 and 1.1) and the ARC file format of the Internet Archive, version 1. The libraries at hand
(warcio, fastwarc) end at the first record whose length is wrong or whose gzip member is broken; this reader looks for
the next record instead, and keeps the part of a page that was read.
"""

from collections.abc import Iterator
import re
from typing import NamedTuple
import zlib

from llmjax.curate import streams
from llmjax.curate.streams import MAX_RECORD

_HEADER_BYTES = 1 << 16  # a longer header is damage
_NEXT = re.compile(rb"\n(?=WARC/\d\.\d\r?\n)")
_HEADER_END = re.compile(rb"\r?\n\r?\n")
# URL, IP address, date of 14 digits, content type, length; URLs of old crawls hold spaces.
_ARC_LINE = re.compile(rb"(\S.*) (\S+) (\d{8,14}) (\S+) (\d{1,18})\r?\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\n]*)?\r?\n")
NO_PAGE = ("content type ", "HTTP status ")  # what a crawl holds beside pages, such as pictures: no fault of the file
_CAPTURED = ("response", "resource", "conversion")
_KINDS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}


class Page(NamedTuple):
    """One captured page.

    row           number of the record in its file, from 0
    id            the record's own, or ""
    url, date     as in the record; the date in ISO 8601
    kind          "html" or "text"
    data          the page's bytes, unpacked
    content_type  the header, with the encoding where it states one
    cut           whether the end of the page is missing
    """

    row: int
    id: str
    url: str
    date: str
    kind: str
    data: bytes
    content_type: str
    cut: bool


class Refused(NamedTuple):
    """A record that gives no page: why, and its address or the first bytes of what was there."""

    row: int
    id: str
    reason: str
    excerpt: str


class _Entry(NamedTuple):
    """A record as it lies in the file; `cut`: whether its end is missing."""

    type: str
    id: str
    url: str
    date: str
    content_type: str
    block: bytes
    cut: bool


def pages(path: str) -> Iterator[Page | Refused]:
    """The pages of a WARC or ARC file, packed or not, and what was captured or left there that is no page.

    Records that hold no captured document (requests, metadata, revisits) are passed over.
    """
    row = 0
    stretches = streams.gzip_stretches(path) if streams.packing_of(path) == "gzip" else iter([streams.blocks(path)])
    arc = False
    for stretch in stretches:
        window = streams.Window(stretch)
        arc = arc or window.look(11).startswith(b"filedesc://")
        for entry in _arc_entries(window) if arc else _warc_entries(window):
            if isinstance(entry, _Entry):
                if entry.type in _CAPTURED:
                    yield _page(row, entry)
            else:
                yield Refused(row, "", *entry)
            row += 1
        if window.damage:
            yield Refused(row, "", "unreadable", window.damage)
            row += 1


def _warc_entries(window: streams.Window) -> Iterator[_Entry | tuple[str, str]]:
    """Records, and (reason, excerpt) for what is none."""
    while _pass_blank_lines(window):
        held = window.look(_HEADER_BYTES)
        end = _HEADER_END.search(held, 0, _HEADER_BYTES)
        if not held.startswith(b"WARC/") or end is None:
            yield "damaged record", _excerpt(held)
            _to_next(window)
            continue
        fields = _fields(bytes(held[: end.start()]))
        length = fields.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length) or "warc-type" not in fields:
            yield "damaged record", _excerpt(held)
            _to_next(window)
            continue
        window.take(end.end())
        block, cut = _block(window, int(length))
        if block is None:
            yield f"longer than {MAX_RECORD >> 20} MiB", fields.get("warc-target-uri", "")[:120]
            continue
        yield _Entry(
            type=fields["warc-type"].lower(),
            id=fields.get("warc-record-id", "").strip("<>"),
            url=fields.get("warc-target-uri", "").strip("<>").replace(" ", "%20"),
            date=fields.get("warc-date", ""),
            content_type=fields.get("content-type", ""),
            block=block,
            cut=cut,
        )


def _block(window: streams.Window, length: int) -> tuple[bytes | None, bool]:
    """(the block of a record, whether its end is missing), where the stated length is not trusted; None: too long.

    A record ends with two line ends, and another one follows, or nothing. Where that is not so, the length is wrong:
    the record ends before the next header, if that lies within it.
    """
    if length > MAX_RECORD:
        held = window.look(MAX_RECORD)
        if inside := _NEXT.search(held):
            return window.take(inside.start()), True
        _skip(window, length)
        return None, True
    held = window.look(length + 64)
    following = bytes(held[length : length + 64]).lstrip(b"\r\n")
    whole = len(held) >= length
    if whole and (following.startswith(b"WARC/") or not following):
        return window.take(length), False
    inside = _NEXT.search(held, 0, length)
    if inside:
        return window.take(inside.start()), True
    block = window.take(length)
    if whole:
        _to_next(window)
    return block, not whole


def _skip(window: streams.Window, length: int) -> None:
    while length > 0 and (taken := len(window.take(min(length, streams.BLOCK)))):
        length -= taken


def _pass_blank_lines(window: streams.Window) -> bool:
    """Go to the next byte that is no line end; False at the end of the stream."""
    while held := window.look(64):
        blank = len(held) - len(held.lstrip(b"\r\n"))
        if not blank:
            return True
        window.take(blank)
    return False


def _to_next(window: streams.Window) -> None:
    """Go to the next record's header, past the byte at hand."""
    window.take(1)
    while window.skip_to(b"\nWARC/") or window.look(1):
        if _NEXT.match(window.look(16)):
            window.take(1)
            return
        if not window.take(1):
            return


def _fields(header: bytes) -> dict[str, str]:
    """Header fields by their lower-case names; the first of a name counts; a line that begins with a space goes on."""
    fields: dict[str, str] = {}
    name = ""
    for line in header.split(b"\n")[1:]:
        text = line.rstrip(b"\r").decode("utf-8", "replace")
        if text[:1] in (" ", "\t") and name:
            fields[name] += " " + text.strip()
            continue
        name, colon, value = text.partition(":")
        name = name.strip().lower()
        if colon and name and name not in fields:
            fields[name] = value.strip()
        elif name in fields:
            name = ""
    return fields


def _arc_entries(window: streams.Window) -> Iterator[_Entry | tuple[str, str]]:
    while _pass_blank_lines(window):
        held = window.look(_HEADER_BYTES)
        line = bytes(held[: held.find(b"\n") + 1])
        found = _ARC_LINE.fullmatch(line)
        if not found:
            if line.startswith(b"filedesc://"):
                _pass_arc_head(window)
                continue
            yield "damaged record", _excerpt(held)
            while (held := window.look(_HEADER_BYTES)) and (line := window.take(held.find(b"\n") + 1 or len(held))):
                following = window.look(_HEADER_BYTES)
                if _ARC_LINE.match(following):
                    break
            continue
        window.take(len(line))
        url, _, date, content_type, length = (part.decode("utf-8", "replace") for part in found.groups())
        if int(length) > MAX_RECORD:
            _skip(window, int(length))
            yield f"longer than {MAX_RECORD >> 20} MiB", url[:120]
            continue
        block = window.take(int(length))
        kind = "resource" if url.startswith("filedesc:") else "response"
        if kind == "response":
            iso = (
                f"{date[:4]}-{date[4:6]}-{date[6:8]}T{date[8:10]}:{date[10:12]}:{date[12:14]}Z"
                if len(date) == 14
                else date
            )
            yield _Entry(kind, "", url.replace(" ", "%20"), iso, content_type, block, len(block) < int(length))


def _pass_arc_head(window: streams.Window) -> None:
    """The first record of an ARC file, whose length is wrong: it ends at a blank line."""
    while (held := window.look(_HEADER_BYTES)) and held[:1] not in b"\r\n":
        window.take(held.find(b"\n") + 1 or len(held))


def _page(row: int, entry: _Entry) -> Page | Refused:
    def refused(reason: str) -> Refused:
        return Refused(row, entry.id, reason, entry.url[:120])

    data, cut, content_type = entry.block, entry.cut, entry.content_type
    if data.startswith(b"HTTP/"):
        end = _HEADER_END.search(data)
        if end is None:
            return refused("cut off")
        status = re.match(rb"HTTP/[\d.]+ +(\d{3})", data)
        if status and status[1] != b"200":
            return refused(f"HTTP status {int(status[1])}")
        fields = _fields(data[: end.start()])
        data, content_type = data[end.end() :], fields.get("content-type", "")
        if fields.get("transfer-encoding", "").lower() == "chunked":
            data = _joined(data)
        for coding in reversed(fields.get("content-encoding", "").lower().replace(",", " ").split()):
            unpacked = _unpacked(data, coding)
            if unpacked is None:
                return refused(f"content encoding {coding[:20]}")
            data, broken = unpacked
            cut = cut or broken
    elif content_type.startswith("application/http"):
        content_type = ""
    name = content_type.partition(";")[0].strip().lower()
    kind = _KINDS.get(name) if name else ("html" if _looks_like_html(data) else "text")
    if kind is None:
        return refused(f"content type {name[:60]}")
    return Page(row, entry.id, entry.url, entry.date, kind, data, content_type, cut)


def _looks_like_html(data: bytes) -> bool:
    head = data[:1024].lower()
    return b"<html" in head or b"<!doctype html" in head


def _joined(data: bytes) -> bytes:
    """The chunks of a chunked body put together; from the first that is none on, the bytes as they are."""
    parts, at = [], 0
    while found := _CHUNK.match(data, at):
        size = int(found[1], 16)
        parts.append(data[found.end() : found.end() + size])
        at = found.end() + size
        if size == 0:
            return b"".join(parts)
        at += 2 if data[at : at + 2] == b"\r\n" else 0
    return b"".join([*parts, data[at:]])


def _unpacked(data: bytes, coding: str) -> tuple[bytes, bool] | None:
    """(content, whether its end is missing), at most MAX_RECORD bytes; None for a coding that is not known."""
    if coding in ("identity", "none", "utf-8"):
        return data, False
    if coding in ("gzip", "x-gzip", "deflate"):
        # Some servers, and some crawlers that unpacked the body, state a coding that is not there.
        for bits in (31, 15, -15) if coding != "deflate" else (15, -15, 31):
            inflater = zlib.decompressobj(bits)
            try:
                out = inflater.decompress(data[:64])
                out += inflater.decompress(inflater.unconsumed_tail + data[64:], MAX_RECORD)
            except zlib.error:
                if data.startswith(b"\x1f\x8b") and bits == 31:
                    return _readable(data), True
                continue
            return out, not inflater.eof
        return data, False
    if coding == "zstd":
        import zstandard

        try:
            return zstandard.ZstdDecompressor().decompressobj().decompress(data), False
        except zstandard.ZstdError:
            return None
    if coding == "br":
        try:
            import brotli  # pyright: ignore[reportMissingImports]
        except ImportError:
            return None
        try:
            return brotli.decompress(data), False
        except brotli.error:
            return None
    return None


def _readable(data: bytes) -> bytes:
    """The content of broken gzip data up to the break."""
    inflater, out = zlib.decompressobj(31), []
    for begin in range(0, len(data), 64):
        try:
            out.append(inflater.decompress(data[begin : begin + 64]))
        except zlib.error:
            break
    return b"".join(out)


def _excerpt(data: bytes | bytearray) -> str:
    return repr(bytes(data[:80]))
