"""Detect the format of a file by its content; the file name decides where the content leaves it open."""

from collections.abc import Iterator
import json
from pathlib import Path
import re

from llmjax.data.readers import streams

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
NAMES = {"text": "text", "jsonl": "JSON lines", "json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet"}
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # as published corpora name their JSON lines
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
_COMPRESSED = re.compile(r"\.(gz|gzip|zst|zstd|xz|bz2)$")
_HEAD = 1 << 16
UTF8_MARK = b"\xef\xbb\xbf"


def ending_of(path: str) -> str:
    """The ending of a file's name in small letters, that of a compression aside."""
    return Path(_COMPRESSED.sub("", path.lower())).suffix


def detect(path: str) -> str:
    """One of FORMATS. JSON and Parquet are recognised by their content, CSV and TSV by the name alone."""
    hint = ENDINGS.get(ending_of(path), "")
    head = head_of(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    return json_format(head, hint == "jsonl") or hint or "text"


def head_of(path: str) -> bytes:
    """The first bytes of the content, without a UTF-8 byte order mark; empty for a file that cannot be read."""
    head = b""
    try:
        for block in streams.blocks(path):
            head += block
            if len(head) >= _HEAD:
                break
    except (streams.Damage, OSError):
        pass
    return head[:_HEAD].removeprefix(UTF8_MARK)


def json_format(head: bytes, expected: bool) -> str:
    """ "jsonl" for an object a line, "json" for arrays and for objects over several lines, "" for what is no JSON."""
    head = head.lstrip()
    if head[:1] not in (b"{", b"["):
        return ""
    whole = len(head) < _HEAD
    lines = [line for line in head.split(b"\n") if line.strip()]
    complete = lines if whole else lines[:-1]
    objects = sum(isinstance(_value(line), dict) for line in complete)
    if expected:
        if objects and not (head[:1] == b"[" and _value(lines[0]) is None):
            return "jsonl"
        if not complete and head[:1] == b"{":
            return "jsonl"  # a line longer than the head
        array = len(lines) == 1 or _value(lines[0]) is None
        return "json" if array and re.match(rb"\[\s*([{\[\"\]]|$)|\{\s*(\"|$)", head) else "jsonl"
    if complete and objects == len(complete):
        return "jsonl"
    return "json" if re.match(rb"\[\s*\{\s*\"", head) and _begins_with_object(head) else ""


def _begins_with_object(head: bytes) -> bool:
    text = head[1:].decode("utf-8", "ignore").lstrip()
    try:
        return isinstance(json.JSONDecoder().raw_decode(text)[0], dict)
    except (ValueError, RecursionError):
        return False


def _value(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def without_mark(data: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks without the UTF-8 byte order mark that they begin with."""
    first = b""
    for block in data:
        first += block
        if len(first) >= len(UTF8_MARK):
            break
    if first := first.removeprefix(UTF8_MARK):
        yield first
    yield from data
