"""Parse JSON streams and CSV files in bounded memory; read the values of Parquet columns."""

from collections import deque
from collections.abc import Iterator
import contextlib
import csv
import re
from typing import Any, NamedTuple

from llmjax.data.readers import streams

EXCERPT = 120  # characters of a rejected record that are shown
_STRUCTURE = re.compile(rb'["{}\[\],]')
_STRING_END = re.compile(rb'(?:[^"\\]|\\.)*+"', re.S)


def split_json(data: Iterator[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | int]]:
    """(offset, JSON) for every top-level object and every element of top-level arrays; its number of bytes in place of
    the JSON of one above `max_bytes`.

    Raises DamageError if the stream ends inside a value. Only brackets and strings are parsed here; json.loads
    checks the rest.
    """
    depth, in_array, in_string, is_escaped = 0, False, False, False
    parts, size, offset = [], 0, 0  # of the current value
    for block in data:
        at = begin = 0
        while at < len(block):
            if in_string:
                at, in_string, is_escaped = _skip_string(block, at, is_escaped)
                continue
            match = _STRUCTURE.search(block, at)
            if not match:
                break
            mark, at = match[0], match.end()
            if mark == b'"':
                in_string, is_escaped = True, False
                continue
            opens, closes = mark in b"{[", mark in b"}]"
            depth += opens - closes
            if mark == b"[" and depth == 1 and not in_array:
                in_array, end, skip = True, at - 1, 1
            elif in_array and ((mark == b"," and depth == 1) or depth <= 0):
                in_array, depth, end, skip = depth > 0, max(depth, 0), at - 1, 1
            elif closes and not in_array and depth <= 0:
                depth, end, skip = 0, at, 0
            else:
                continue
            parts.append(block[begin:end])
            size += end - begin
            if value := (size if size > max_bytes else b"".join(parts).strip()):
                yield offset, value
            offset, parts, size, begin = offset + size + skip, [], 0, end + skip
        size += len(block) - begin
        parts = [*parts, block[begin:]] if size <= max_bytes else []
    if in_array or depth or in_string:
        raise streams.DamageError("the file ends inside a JSON value", max(size, 1))
    if rest := b"".join(parts).strip():
        yield offset, rest


def _skip_string(block: bytes, at: int, is_escaped: bool) -> tuple[int, bool, bool]:
    """(position after the string or the block, still inside the string, the next byte is escaped)."""
    at += is_escaped
    if end := _STRING_END.match(block, at):
        return end.end(), False, False
    tail = block[at:]
    return len(block), True, bool((len(tail) - len(tail.rstrip(b"\\"))) % 2)


class BadRow(NamedTuple):
    """Lines of a CSV file that are not a row."""

    reason: str
    excerpt: str
    size: int


def parse_csv(
    data: Iterator[bytes], kind: str, max_bytes: int, text_field: str = ""
) -> Iterator[tuple[list[str], int] | BadRow]:
    """(values, bytes) of the rows of a CSV or TSV file, header included. Bytes that are not UTF-8 become surrogates.

    CSV as in RFC 4180, and with semicolons, tabs or bars where only they make `text_field` a column of the header;
    TSV as registered with IANA: a tab or a line end is never part of a field, a quote is a quote.
    An unclosed quote invalidates only the line that opens it; the lines after it are parsed again without it.
    """
    csv.field_size_limit(max(max_bytes, csv.field_size_limit()))
    feed = _LineFeed(streams.split_lines(data, max_bytes=max_bytes, lone_cr=True), max_bytes)
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
    reader = csv.reader(feed, **style)
    is_header = kind == "csv" and bool(text_field)
    while True:
        feed.row.clear()
        try:
            values = next(reader)
        except StopIteration:
            if not feed.fault:
                return
            values = []
        except csv.Error as error:
            feed.fault = str(error)
            values = []
        size = sum(map(len, feed.row))
        if feed.fault:
            first = feed.row[0] if feed.row else ""
            yield BadRow(feed.fault, first[:EXCERPT].strip(), feed.long_line or len(first))
            feed.parse_again.extendleft(reversed(feed.row[1:]))
            feed.fault, feed.long_line = "", 0
            reader = csv.reader(feed, **style)
        elif values:
            if is_header and len(feed.row) == 1 and text_field not in values:
                for delimiter in ";\t|":
                    cells = next(csv.reader(feed.row, delimiter=delimiter))
                    if text_field in cells:
                        values, style = cells, {"delimiter": delimiter}
                        reader = csv.reader(feed, **style)
            is_header = False
            yield values, size


class _LineFeed:
    """Lines for a csv.reader, which requests another one inside a row only if a quote is open."""

    def __init__(self, lines: Iterator[tuple[int, bytes | int]], max_bytes: int):
        self._lines, self._max_bytes, self._size = lines, max_bytes, 0
        self.row: list[str] = []
        self.parse_again: deque[str] = deque()
        self.fault, self.long_line = "", 0

    def __iter__(self) -> "_LineFeed":
        return self

    def __next__(self) -> str:
        self._size = self._size if self.row else 0
        if self.row and self._size > self._max_bytes:
            self.fault = f"a quote that stays open for more than {self._max_bytes} bytes"
            raise StopIteration
        line = self.parse_again.popleft() if self.parse_again else next(self._lines, (0, None))[1]
        if line is None:
            self.fault = "the file ends inside a quote" if self.row else ""
            raise StopIteration
        if isinstance(line, int):
            self.fault, self.long_line = f"longer than {self._max_bytes} bytes", line
            raise StopIteration
        text = line if isinstance(line, str) else line.decode("utf-8", "surrogateescape")
        self.row.append(text)
        self._size += len(text)
        return text


def read_column(column: Any) -> list:
    """The values of an Arrow column; text as bytes, since it may not be UTF-8. Extension types are unwrapped."""
    import pyarrow

    try:
        while isinstance(column.type, pyarrow.BaseExtensionType) or pyarrow.types.is_dictionary(column.type):
            is_dictionary = pyarrow.types.is_dictionary(column.type)
            column = column.dictionary_decode() if is_dictionary else column.storage
        return (column.cast(pyarrow.large_binary()) if is_text(column.type) else column).to_pylist()
    except Exception:  # text in lists that is not UTF-8, dates beyond Python's calendar, unknown time zones
        return [_to_python(value) for value in column]


def _to_python(value: Any) -> object:
    """The value as a Python object, else its representation, else None."""
    for convert in (lambda: value.as_py(), lambda: str(value)[:EXCERPT]):
        with contextlib.suppress(Exception):
            return convert()
    return None


def is_text(kind: Any) -> bool:
    """Whether an Arrow type holds text, also inside dictionaries and extension types."""
    import pyarrow

    while isinstance(kind, pyarrow.BaseExtensionType) or pyarrow.types.is_dictionary(kind):
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind.storage_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in names
