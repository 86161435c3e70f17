"""Read the pages of WARC and ARC files, also after damaged records.

Formats: ISO 28500 (WARC 1.0 and 1.1) and the ARC file format of the Internet Archive, version 1. FastWARC 2.0 reads
WARC at twice the speed, but not ARC, and it stops at the first damaged record: of the complete pages in files with one
such record it returns 53% (this reader: 98%). A page without its end is rejected, never returned in part.
"""

from collections.abc import Iterator
import re
from typing import NamedTuple

from llmjax.curate.readers import bodies
from llmjax.data.readers import streams
from llmjax.data.readers.documents import UNREADABLE
from llmjax.data.readers.records import EXCERPT
from llmjax.data.readers.streams import Window

_MAX_HEADER_BYTES = 1 << 16  # a longer header is damage
_NEXT_RECORD = re.compile(rb"\n(?=WARC/\d\.\d\r?\n)")
_HEADER_END = re.compile(rb"\r?\n\r?\n")
# URL, IP address, date of 14 digits, content type, length; URLs of old crawls contain spaces.
_ARC_LINE = re.compile(rb"(\S.*) (\S+) (\d{8,14}) (\S+) (\d{1,18})\r?\n")
_TRUNCATED = "truncated by the crawler"
# Reasons of records that are not damaged but have no complete page, such as pictures.
NO_PAGE = ("content type ", "HTTP status ", _TRUNCATED)
CUT_OFF, DAMAGED = "cut off", "damaged record"
_MEDIA_TYPE = re.compile(r"\s*([\w.+-]+/[\w.+-]+)")
# Such as "100 Continue", before the response itself (RFC 9110, 15.2).
_INTERIM_RESPONSES = re.compile(rb"\A(?:HTTP/[\d.]+ +1\d\d[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n)+(?=HTTP/)")
_CAPTURE_TYPES = ("response", "resource", "conversion")
_KINDS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}


class Page(NamedTuple):
    """One captured page.

    row           index of the record in its file
    id            from the record, or ""
    url, date     from the record; the date in ISO 8601
    kind          "html" or "text"
    data          the decompressed bytes of the page
    content_type  the media type, with the charset if the header states one
    """

    row: int
    id: str
    url: str
    date: str
    kind: str
    data: bytes
    content_type: str


class RejectedPage(NamedTuple):
    """A record without a page.

    excerpt  its URL or first bytes
    size     estimated bytes lost to damage; 0 for an intact record, such as a picture
    """

    row: int
    id: str
    reason: str
    excerpt: str
    size: int = 0


class _Entry(NamedTuple):
    """A record of the archive. `fault`: why it has no page, "" if it is complete. `size`: bytes of its block."""

    type: str
    id: str
    url: str
    date: str
    content_types: list[str]
    block: bytes
    fault: str
    size: int


class _Gap(NamedTuple):
    """Bytes of the archive between records."""

    reason: str
    excerpt: str
    size: int


def read_pages(path: str, max_record_bytes: int) -> Iterator[Page | RejectedPage]:
    """The pages of a WARC or ARC file, and a reject for every other captured or damaged record.

    Records without a captured document (requests, metadata, revisits) are skipped.
    """
    row = 0
    is_gzip = streams.detect_compression(path) == "gzip"
    segments = streams.read_gzip_segments(path) if is_gzip else iter([streams.read_blocks(path)])
    is_arc = False
    for segment in segments:
        window = Window(segment)
        is_arc = is_arc or window.peek(11).startswith(b"filedesc://")
        for entry in (_read_arc_entries if is_arc else _read_warc_entries)(window, max_record_bytes):
            if isinstance(entry, _Gap):
                yield RejectedPage(row, "", *entry)
            elif entry.type in _CAPTURE_TYPES:
                yield _to_page(row, entry, max_record_bytes)
            row += 1
        if window.damage:
            yield RejectedPage(row, "", UNREADABLE, str(window.damage), window.damage.lost_bytes)
            row += 1


def _read_warc_entries(window: Window, max_record_bytes: int) -> Iterator[_Entry | _Gap]:
    while _skip_blank_lines(window):
        data = window.peek(_MAX_HEADER_BYTES)
        end = _HEADER_END.search(data, 0, _MAX_HEADER_BYTES)
        if not data.startswith(b"WARC/") or end is None:
            yield _skip_gap(window)
            continue
        fields = _parse_header(bytes(data[: end.start()]))
        first = {name: values[0] for name, values in fields.items()}
        length = first.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length) or "warc-type" not in fields:
            yield _skip_gap(window)
            continue
        window.read(end.end())
        block, fault = _read_block(window, int(length), max_record_bytes)
        size = max(len(block), int(length)) if fault.startswith("longer") else len(block)
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
            size=size,
        )


def _read_block(window: Window, length: int, max_record_bytes: int) -> tuple[bytes, str]:
    """(the block of a record, why it is incomplete or ""). The stated length may be wrong.

    After a record come two line ends and then another record or the end of the file. Otherwise the length is wrong or
    bytes are missing, and the record ends before the next header.
    """
    data = window.peek(min(length, max_record_bytes) + 64)
    following = bytes(data[length : length + 64]).lstrip(b"\r\n")
    is_within_limit = length <= max_record_bytes
    if is_within_limit and len(data) >= length and (following.startswith(b"WARC/") or not following):
        return window.read(length), ""
    if next_record := _NEXT_RECORD.search(window.peek(max_record_bytes), 0, max_record_bytes):
        return window.read(next_record.start()), DAMAGED
    if not is_within_limit:
        window.skip(length)
        return b"", _length_fault(max_record_bytes)
    block = window.read(length)
    return block, CUT_OFF if len(block) < length else DAMAGED


def _length_fault(max_record_bytes: int) -> str:
    return f"longer than {max_record_bytes} bytes (max_record_bytes)"


def _skip_blank_lines(window: Window) -> bool:
    """Move to the next byte that is not a line end. False at the end of the stream."""
    while data := window.peek(64):
        num_blank = len(data) - len(data.lstrip(b"\r\n"))
        if not num_blank:
            return True
        window.read(num_blank)
    return False


def _skip_gap(window: Window) -> _Gap:
    """Move to the header of the next record, by at least one byte."""
    excerpt = _make_excerpt(window.peek(_MAX_HEADER_BYTES))
    size = len(window.read(1))
    while (num_skipped := window.skip_to(b"\nWARC/")) or window.peek(1):
        size += num_skipped
        if _NEXT_RECORD.match(window.peek(16)):
            window.read(1)
            break
        if not window.read(1):
            break
        size += 1
    return _Gap(DAMAGED, excerpt, size)


def _parse_header(header: bytes) -> dict[str, list[str]]:
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


def _read_arc_entries(window: Window, max_record_bytes: int) -> Iterator[_Entry | _Gap]:
    while _skip_blank_lines(window):
        data = window.peek(_MAX_HEADER_BYTES)
        line = bytes(data[: data.find(b"\n") + 1])
        match = _ARC_LINE.fullmatch(line)
        if not match:
            if line.startswith(b"filedesc://"):
                _skip_arc_header(window)
            else:
                yield _skip_arc_gap(window)
            continue
        window.read(len(line))
        url, _, date, content_type, length = (part.decode("utf-8", "replace") for part in match.groups())
        if int(length) > max_record_bytes:
            window.skip(int(length))
            yield _Gap(_length_fault(max_record_bytes), url[:EXCERPT], int(length))
            continue
        block = window.read(int(length))
        if not url.startswith("filedesc:"):
            if len(date) == 14:
                date = f"{date[:4]}-{date[4:6]}-{date[6:8]}T{date[8:10]}:{date[10:12]}:{date[12:14]}Z"
            fault = CUT_OFF if len(block) < int(length) else ""
            yield _Entry("response", "", url.replace(" ", "%20"), date, [content_type], block, fault, len(block))


def _skip_arc_gap(window: Window) -> _Gap:
    """Move to the next line that is the header of a record."""
    excerpt, size = _make_excerpt(window.peek(_MAX_HEADER_BYTES)), 0
    while data := window.peek(_MAX_HEADER_BYTES):
        size += len(window.read(data.find(b"\n") + 1 or len(data)))
        if _ARC_LINE.match(window.peek(_MAX_HEADER_BYTES)):
            break
    return _Gap(DAMAGED, excerpt, size)


def _skip_arc_header(window: Window) -> None:
    """Skip the first record of an ARC file. It ends at a blank line; its stated length is wrong."""
    while (data := window.peek(_MAX_HEADER_BYTES)) and data[:1] not in b"\r\n":
        window.read(data.find(b"\n") + 1 or len(data))


def _to_page(row: int, entry: _Entry, max_record_bytes: int) -> Page | RejectedPage:
    def reject(reason: str) -> RejectedPage:
        size = 0 if reason.startswith(NO_PAGE) else max(entry.size, 1)
        return RejectedPage(row, entry.id, reason, entry.url[:EXCERPT], size)

    if entry.fault not in ("", CUT_OFF, DAMAGED):
        return reject(entry.fault)
    data, content_types, fault = entry.block, entry.content_types, entry.fault
    data = _INTERIM_RESPONSES.sub(b"", data, count=1)
    if data.startswith(b"HTTP/"):
        end = _HEADER_END.search(data)
        if end is None:
            return reject(CUT_OFF)
        status = re.match(rb"HTTP/[\d.]+ +(\d{3})", data)
        if status and status[1] != b"200":
            return reject(f"HTTP status {int(status[1])}")
        fields = _parse_header(data[: end.start()])
        body, content_types = data[end.end() :], fields.get("content-type", [])
        codings = [", ".join(fields.get(name, [])) for name in ("transfer-encoding", "content-encoding")]
        try:
            data = bodies.decode(body, *codings, limit=max_record_bytes)
        except bodies.BodyError as error:
            return reject(str(error))
        # A body that was decoded to the end of its coding is complete.
        fault = _check_length(body, fields, fault) if data is body else ""
    elif content_types and content_types[0].startswith("application/http"):
        content_types = []
    if fault:
        return reject(fault)
    content_type = _select_media_type(content_types)
    name = re.split("[; ,]", content_type)[0].lower()
    kind = _KINDS.get(name) if name else ("html" if _looks_like_html(data) else "text")
    if kind is None:
        return reject(f"content type {name[:60]}")
    return Page(row, entry.id, entry.url, entry.date, kind, data, content_type)


def _check_length(body: bytes, fields: dict[str, list[str]], fault: str) -> str:
    """Why a body is incomplete, "" if it is complete, by its Content-Length and the fault of its record.

    A body of the stated length is complete even if its record is damaged. Some crawlers write wrong lengths, so a
    shorter body is cut off only if it also lacks the end of a page.
    """
    length = fields.get("content-length", [""])[0]
    if not re.fullmatch(r"[0-9]{1,18}", length) or "transfer-encoding" in fields:
        return fault
    if fault:
        return "" if 0 <= len(body) - int(length) <= len(b"\r\n\r\n") else fault
    return CUT_OFF if 0 < len(body) < int(length) and b"</html" not in body[-1024:].lower() else ""


def _select_media_type(values: list[str]) -> str:
    """One Content-Type of all that a header states: the last one, as in browsers (fetch.spec.whatwg.org, "extract a
    MIME type"); "" if none is valid. A charset stated earlier for the same type stays valid."""
    essence, parameters = "", ""
    for value in re.split(r",(?=\s*[\w.+*-]+/)", ",".join(values)):
        if not (match := _MEDIA_TYPE.match(value)):
            continue
        name, rest = match[1].lower(), value[match.end() :]
        if name != essence or "charset" in rest.lower():
            essence, parameters = name, rest
    return essence + parameters


def _looks_like_html(data: bytes) -> bool:
    head = data[:1024].lower()
    return b"<html" in head or b"<!doctype html" in head


def _make_excerpt(data: bytes | bytearray) -> str:
    return repr(bytes(data[:80]))
