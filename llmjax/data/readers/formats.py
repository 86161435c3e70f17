"""Detect the format of a file by its content; the file name decides where the content leaves it open."""

from collections.abc import Callable, Container, Iterator
import json
from pathlib import Path
import re

from llmjax.data.readers import streams

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
_MAGIC = ((b"PAR1", "parquet"), (b"WARC/", "warc"), (b"filedesc://", "warc"))
_COMPRESSED = re.compile(r"\.(gz|gzip|zst|zstd|xz|bz2)$")
_HEAD_BYTES = 1 << 16
_UTF8_BOM = b"\xef\xbb\xbf"


def detect(path: str, formats: Container[str] = FORMATS) -> str:
    """One of `formats`. JSON, Parquet and WARC are recognised by their content, the others by the file name alone."""
    ending = Path(_COMPRESSED.sub("", path.lower())).suffix
    hint = _ENDINGS.get(ending, "text")
    hint = hint if hint in formats else "text"
    head = _read_head(path)
    for magic, name in _MAGIC:
        if head.startswith(magic) and name in formats:
            return name
    return _json_format(head, hint == "jsonl") or hint


def _read_head(path: str) -> bytes:
    """The first bytes of the content, without a UTF-8 byte order mark; empty for an unreadable file."""
    head = b""
    try:
        for block in streams.read_blocks(path):
            head += block
            if len(head) >= _HEAD_BYTES:
                break
    except (streams.DamageError, OSError):
        pass
    return head[:_HEAD_BYTES].removeprefix(_UTF8_BOM)


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
        if len(first) >= len(_UTF8_BOM):
            break
    if first := first.removeprefix(_UTF8_BOM):
        yield first
    yield from data
