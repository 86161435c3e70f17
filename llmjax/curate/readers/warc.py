"""Read the pages of WARC and ARC files; continues after damage.

Formats: ISO 28500 (WARC 1.0 and 1.1) and the ARC file format of the Internet Archive, version 1. FastWARC 2.0 reads
WARC at twice the speed, but not ARC, and it ends at the first damaged place: of the whole pages in files with one such
place it returns 53% (this reader: 98%). A page whose end is missing is refused, never returned in part.
"""

from collections.abc import Iterator
import re
from typing import NamedTuple

from llmjax.curate.readers import bodies
from llmjax.data.readers import streams
from llmjax.data.readers.streams import MAX_RECORD

_HEADER_BYTES = 1 << 16  # a longer header is damage
_NEXT = re.compile(rb"\n(?=WARC/\d\.\d\r?\n)")
_HEADER_END = re.compile(rb"\r?\n\r?\n")
# URL, IP address, date of 14 digits, content type, length; URLs of old crawls hold spaces.
_ARC_LINE = re.compile(rb"(\S.*) (\S+) (\d{8,14}) (\S+) (\d{1,18})\r?\n")
_TRUNCATED = "truncated by the crawler"
# What a crawl holds beside whole pages, such as pictures: no fault of the file.
NO_PAGE = ("content type ", "HTTP status ", _TRUNCATED)
CUT_OFF, DAMAGED = "cut off", "damaged record"
_ESSENCE = re.compile(r"\s*([\w.+-]+/[\w.+-]+)")
_CAPTURED = ("response", "resource", "conversion")
_KINDS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}


class Page(NamedTuple):
    """One captured page.

    row           number of the record in its file, from 0
    id            the record's own, or ""
    url, date     as in the record; the date in ISO 8601
    kind          "html" or "text"
    data          the page's bytes, unpacked
    content_type  its media type, with the charset where the header states one
    """

    row: int
    id: str
    url: str
    date: str
    kind: str
    data: bytes
    content_type: str


class Refused(NamedTuple):
    """A record that gives no page: why, and its address or the first bytes of what was there."""

    row: int
    id: str
    reason: str
    excerpt: str


class _Entry(NamedTuple):
    """A record as it lies in the file; `fault`: why no page can be made of it, "" where it is whole."""

    type: str
    id: str
    url: str
    date: str
    content_types: list[str]
    block: bytes
    fault: str


def pages(path: str) -> Iterator[Page | Refused]:
    """The pages of a WARC or ARC file, packed or not, and what was captured or left there that is no page.

    Records that hold no captured document (requests, metadata, revisits) are passed over.
    """
    row = 0
    stretches = streams.gzip_stretches(path) if streams.compression_of(path) == "gzip" else iter([streams.blocks(path)])
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
            yield DAMAGED, _excerpt(held)
            _to_next(window)
            continue
        fields = _fields(bytes(held[: end.start()]))
        first = {name: values[0] for name, values in fields.items()}
        length = first.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length) or "warc-type" not in fields:
            yield DAMAGED, _excerpt(held)
            _to_next(window)
            continue
        window.take(end.end())
        block, fault = _block(window, int(length))
        if "warc-truncated" in fields:
            fault = fault or _TRUNCATED
        elif "warc-segment-number" in fields:
            fault = fault or "segment of a record"
        yield _Entry(
            type=first["warc-type"].lower(),
            id=first.get("warc-record-id", "").strip("<>"),
            url=first.get("warc-target-uri", "").strip("<>").replace(" ", "%20"),
            date=first.get("warc-date", ""),
            content_types=fields.get("content-type", []),
            block=block,
            fault=fault,
        )


def _block(window: streams.Window, length: int) -> tuple[bytes, str]:
    """(the block of a record, why it is not whole or ""). The stated length is not trusted.

    A record ends with two line ends, and another one follows, or nothing. Where that is not so, the length is wrong or
    bytes are missing: the record then ends before the next header, wherever that is.
    """
    held = window.look(min(length, MAX_RECORD) + 64)
    following = bytes(held[length : length + 64]).lstrip(b"\r\n")
    if length <= MAX_RECORD and len(held) >= length and (following.startswith(b"WARC/") or not following):
        return window.take(length), ""
    if following_header := _NEXT.search(window.look(MAX_RECORD), 0, MAX_RECORD):
        return window.take(following_header.start()), DAMAGED
    if length > MAX_RECORD:
        _skip(window, length)
        return b"", f"longer than {MAX_RECORD >> 20} MiB"
    block = window.take(length)
    return block, CUT_OFF if len(block) < length else DAMAGED


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


def _fields(header: bytes) -> dict[str, list[str]]:
    """Values of the header fields by their lower-case names; a line that begins with a space continues the last one."""
    fields: dict[str, list[str]] = {}
    values: list[str] = []
    for line in header.split(b"\n")[1:]:
        text = line.rstrip(b"\r").decode("utf-8", "replace")
        if text[:1] in (" ", "\t") and values:
            values[-1] += " " + text.strip()
            continue
        name, colon, value = text.partition(":")
        values = fields.setdefault(name.strip().lower(), []) if colon and name.strip() else []
        if colon:
            values.append(value.strip())
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
            yield DAMAGED, _excerpt(held)
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
        if not url.startswith("filedesc:"):
            iso = (
                f"{date[:4]}-{date[4:6]}-{date[6:8]}T{date[8:10]}:{date[10:12]}:{date[12:14]}Z"
                if len(date) == 14
                else date
            )
            fault = CUT_OFF if len(block) < int(length) else ""
            yield _Entry("response", "", url.replace(" ", "%20"), iso, [content_type], block, fault)


def _pass_arc_head(window: streams.Window) -> None:
    """The first record of an ARC file, whose length is wrong: it ends at a blank line."""
    while (held := window.look(_HEADER_BYTES)) and held[:1] not in b"\r\n":
        window.take(held.find(b"\n") + 1 or len(held))


def _page(row: int, entry: _Entry) -> Page | Refused:
    def refused(reason: str) -> Refused:
        return Refused(row, entry.id, reason, entry.url[:120])

    if entry.fault not in ("", CUT_OFF, DAMAGED):
        return refused(entry.fault)
    data, content_types, fault = entry.block, entry.content_types, entry.fault
    if data.startswith(b"HTTP/"):
        end = _HEADER_END.search(data)
        if end is None:
            return refused(CUT_OFF)
        status = re.match(rb"HTTP/[\d.]+ +(\d{3})", data)
        if status and status[1] != b"200":
            return refused(f"HTTP status {int(status[1])}")
        fields = _fields(data[: end.start()])
        body, content_types = data[end.end() :], fields.get("content-type", [])
        codings = [", ".join(fields.get(name, [])) for name in ("transfer-encoding", "content-encoding")]
        try:
            data = bodies.decode(body, *codings, limit=MAX_RECORD)
        except bodies.BadBody as error:
            return refused(str(error))
        # A coding that was undone to its end proves the body whole.
        fault = _fault_by_length(body, fields, fault) if data is body else ""
    elif content_types and content_types[0].startswith("application/http"):
        content_types = []
    if fault:
        return refused(fault)
    content_type = _media_type(content_types)
    name = re.split("[; ,]", content_type)[0].lower()
    kind = _KINDS.get(name) if name else ("html" if _looks_like_html(data) else "text")
    if kind is None:
        return refused(f"content type {name[:60]}")
    return Page(row, entry.id, entry.url, entry.date, kind, data, content_type)


def _fault_by_length(body: bytes, fields: dict[str, list[str]], fault: str) -> str:
    """Why a body is not whole, "" where it is, judged by Content-Length and by what is wrong with its record.

    A length that fits proves a body whole whose record is damaged. Some crawlers leave wrong lengths, so that a body
    which is shorter counts as cut off only where no end of a page is there.
    """
    length = fields.get("content-length", [""])[0]
    if not re.fullmatch(r"[0-9]{1,18}", length) or "transfer-encoding" in fields:
        return fault
    if fault:
        return "" if 0 <= len(body) - int(length) <= len(b"\r\n\r\n") else fault
    return CUT_OFF if 0 < len(body) < int(length) and b"</html" not in body[-1024:].lower() else ""


def _media_type(values: list[str]) -> str:
    """One Content-Type of all that a header states: the last one, as browsers do (fetch.spec.whatwg.org, "extract a
    MIME type"). A charset stated earlier for the same type holds on."""
    essence, parameters = "", ""
    for value in re.split(r",(?=\s*[\w.+*-]+/)", ",".join(values)):
        if not (found := _ESSENCE.match(value)):
            continue
        name, rest = found[1].lower(), value[found.end() :]
        if name != essence or "charset" in rest.lower():
            essence, parameters = name, rest
    return essence + parameters if essence else ",".join(values)


def _looks_like_html(data: bytes) -> bool:
    head = data[:1024].lower()
    return b"<html" in head or b"<!doctype html" in head


def _excerpt(data: bytes | bytearray) -> str:
    return repr(bytes(data[:80]))
