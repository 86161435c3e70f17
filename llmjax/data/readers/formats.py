"""Detect the format of a file by its content; the file name decides where the content leaves it open."""

from collections.abc import Callable, Container, Iterator
import contextlib
import json
from pathlib import Path
import re

from llmjax.data.readers import encodings, streams

# What `prepare` reads, and what `curate` reads in addition.
FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
CURATE_FORMATS = ("text", "lines", "jsonl", "json", "parquet", "csv", "tsv", "html", "warc")
NAMES = {
    "text": "text",
    "lines": "lines of text",
    "jsonl": "JSON lines",
    "json": "JSON",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "html": "HTML",
    "warc": "WARC",
    "tfds": "a TFDS data set",
    "unsupported": "an unsupported format",
}
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # as published corpora name their JSON lines
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".warc": "warc",
    ".wet": "warc",
    ".arc": "warc",
}
UNSUPPORTED = "unsupported"
# What the content begins with -> why it is no text, and what to do.
_NO_TEXT = (
    (re.compile(rb"(?=.{0,256}\0).{257}ustar[\0 ]", re.S), "a tar archive; unpack it"),
    (re.compile(rb"PK\x03\x04|7z\xbc\xaf|Rar!\x1a"), "an archive; unpack it"),
    (re.compile(rb"\x04\x22\x4d\x18|\x1f\x9d|\x5d\0\0"), "compressed by lz4, compress or lzma; decompress it"),
    (re.compile(rb"ARROW1|FEA1"), "an Arrow file; write it as Parquet"),
    (re.compile(rb"%PDF-\d"), "a PDF; extract its text"),
)
_MAGIC = ((b"PAR1", "parquet"), (b"WARC/", "warc"), (b"filedesc://", "warc"))
_COMPRESSED = re.compile(r"\.(gz|gzip|zst|zstd|xz|bz2)$")
_HEAD_BYTES = 1 << 16
UTF8_BOM = b"\xef\xbb\xbf"


def detect(path: str, formats: Container[str] = FORMATS) -> str:
    """One of `formats`, or UNSUPPORTED. JSON, Parquet and WARC are recognised by their content, the others by the file
    name alone."""
    ending = Path(_COMPRESSED.sub("", path.lower())).suffix
    hint = _ENDINGS.get(ending, "text")
    hint = hint if hint in formats else "text"
    head = _read_head(path)
    if explain_unsupported(path, head, is_lenient="warc" in formats):
        return UNSUPPORTED
    for magic, name in _MAGIC:
        if head.startswith(magic) and name in formats:
            return name
    return _json_format(head, hint == "jsonl") or hint


def explain_unsupported(path: str, head: bytes | None = None, is_lenient: bool = False) -> str:
    """Why a file is neither text nor a format that is read, and what to do; "" if it may be."""
    head = _read_head(path) if head is None else head
    if not is_lenient and head.startswith((b"WARC/", b"filedesc://")):
        return "a WARC or ARC file; extract its pages with `llmjax curate`"
    if not is_lenient and encodings.is_wide(next(_read_blocks(path), b"")):
        return "UTF-16 or UTF-32; convert it to UTF-8"
    if streams.detect_compression(path) and (streams.match_compression(head) or head.startswith(b"PAR1")):
        return "compressed twice, or Parquet in another compression; decompress it once"
    return next((reason for magic, reason in _NO_TEXT if magic.match(head)), "")


def _read_head(path: str) -> bytes:
    """The first bytes of the content as UTF-8, without a byte order mark; empty for an unreadable file."""
    head = b""
    for block in encodings.convert_to_utf8(_read_blocks(path))[0]:
        head += block
        if len(head) >= _HEAD_BYTES:
            break
    return head[:_HEAD_BYTES].removeprefix(UTF8_BOM)


def _read_blocks(path: str) -> Iterator[bytes]:
    with contextlib.suppress(streams.DamageError, OSError):
        yield from streams.read_blocks(path)


def _json_format(head: bytes, is_expected: bool) -> str:
    """ "jsonl" for one object a line, "json" for arrays and for objects over several lines, "" for anything else."""
    head = head.lstrip()
    if head[:1] not in (b"{", b"["):
        return ""
    lines = [line for line in head.split(b"\n") if line.strip()]
    complete_lines = lines if len(head) < _HEAD_BYTES else lines[:-1]
    num_objects = sum(isinstance(_parse(line), dict) for line in complete_lines)
    if is_expected:
        if num_objects and not (head[:1] == b"[" and _parse(lines[0]) is None):
            return "jsonl"
        if not complete_lines and head[:1] == b"{":
            return "jsonl"  # a line longer than the head
        is_array = len(lines) == 1 or _parse(lines[0]) is None
        return "json" if is_array and re.match(rb"\[\s*([{\[\"\]]|$)|\{\s*(\"|$)", head) else "jsonl"
    if complete_lines and num_objects == len(complete_lines):
        return "jsonl"
    return "json" if re.match(rb"\[\s*\{\s*\"", head) and _begins_with_object(head) else ""


def _begins_with_object(head: bytes) -> bool:
    text = head[1:].decode("utf-8", "ignore").lstrip()
    return isinstance(_parse(text, lambda value: json.JSONDecoder().raw_decode(value)[0]), dict)


def _parse(value: bytes | str, parser: Callable = json.loads) -> object:
    """The JSON value, None where there is none."""
    try:
        return parser(value)
    except (ValueError, RecursionError):
        return None


def strip_bom(data: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks without the UTF-8 byte order mark at their beginning."""
    first = b""
    for block in data:
        first += block
        if len(first) >= len(UTF8_BOM):
            break
    if first := first.removeprefix(UTF8_BOM):
        yield first
    yield from data
