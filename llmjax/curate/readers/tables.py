"""Rows of CSV and TSV files and values of Parquet columns, for any bytes they contain."""

from collections.abc import Iterator
import contextlib
import csv

from llmjax.curate.readers import encodings
from llmjax.data.readers import records, streams
from llmjax.data.readers.streams import MAX_RECORD

_EXCERPT = 120


def rows(path: str, kind: str) -> Iterator[list[str]]:
    """The rows of a CSV or TSV file, header included. Bytes that are not UTF-8 come as surrogates.

    Raises csv.Error for a row that is none, or too long, and goes on after it.

    CSV as in RFC 4180; TSV as registered with IANA: a tab or a line end is never part of a field, a quote is a quote.
    """
    data, _ = encodings.as_utf8(streams.blocks(path))
    csv.field_size_limit(MAX_RECORD)
    lines = map(_line, streams.lines(data, limit=MAX_RECORD, lone_cr=True))
    if kind == "tsv":
        return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(lines)


def _line(numbered: tuple[int, bytes | int]) -> str:
    offset, line = numbered
    if isinstance(line, int):
        raise csv.Error(f"a line longer than {MAX_RECORD >> 20} MiB")
    return line.removeprefix(b"\xef\xbb\xbf" if offset == 0 else b"").decode("utf-8", "surrogateescape")


class Cells:
    """Mends cells that are not UTF-8, by an encoding that is chosen once for a file, from its first bytes."""

    def __init__(self, path: str, declared: str):
        self._path, self._declared = path, declared

    def cell(self, value: str, notes: dict[str, int]) -> str:
        if value.isascii():
            return value
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            if not self._declared:
                self._declared = encodings.likeliest(next(streams.blocks(self._path), b""))
            text, mended = encodings.decode(value.encode("utf-8", "surrogateescape"), self._declared)
            for name, count in mended.items():
                notes[name] = max(notes.get(name, 0), count)
            return text or ""


def values(column) -> list:
    """The values of a column; strings as bytes, since they may hold bytes that are no UTF-8."""
    try:
        return records.as_bytes(column).to_pylist()
    except Exception:  # texts in lists that are not UTF-8, dates that Python's calendar lacks, unknown time zones
        return [_value(value) for value in column]


def _value(value) -> object:
    """A value as Python has it, else what it looks like, else None."""
    for form in (lambda: value.as_py(), lambda: str(value)[:_EXCERPT]):
        with contextlib.suppress(Exception):
            return form()
    return None
