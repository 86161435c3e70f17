"""Records of JSON streams and CSV files in bounded memory; values of Parquet columns."""

from collections import deque
from collections.abc import Iterator
import csv
import re
from typing import NamedTuple

from llmjax.data.readers import streams

_STRUCTURE = re.compile(rb'["{}\[\],]')
_STRING_END = re.compile(rb'(?:[^"\\]|\\.)*+"', re.S)


def json_elements(data: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes | int]]:
    """(offset, JSON) for every object, and for every element of arrays, at the top of a stream; its number of bytes in
    place of one longer than `limit`.

    Raises Damage where the stream ends inside a value. Only brackets and strings are looked at: json.loads judges.
    """
    depth, array, inside, escaped = 0, False, False, False
    held, size, offset = [], 0, 0  # of the value at hand
    for block in data:
        at = begin = 0
        while at < len(block):
            if inside:
                at, inside, escaped = _pass_string(block, at, escaped)
                continue
            found = _STRUCTURE.search(block, at)
            if not found:
                break
            mark, at = found[0], found.end()
            if mark == b'"':
                inside, escaped = True, False
                continue
            opens, closes = mark in b"{[", mark in b"}]"
            depth += opens - closes
            if mark == b"[" and depth == 1 and not array:
                array, end, skip = True, at - 1, 1
            elif array and ((mark == b"," and depth == 1) or depth <= 0):
                array, depth, end, skip = depth > 0, max(depth, 0), at - 1, 1
            elif closes and not array and depth <= 0:
                depth, end, skip = 0, at, 0
            else:
                continue
            held.append(block[begin:end])
            size += end - begin
            if value := (size if size > limit else b"".join(held).strip()):
                yield offset, value
            offset, held, size, begin = offset + size + skip, [], 0, end + skip
        size += len(block) - begin
        held = [*held, block[begin:]] if size <= limit else []
    if array or depth or inside:
        raise streams.Damage("the file ends inside a JSON value", max(size, 1))
    if rest := b"".join(held).strip():
        yield offset, rest


def _pass_string(block: bytes, at: int, escaped: bool) -> tuple[int, bool, bool]:
    """(place after the string or the block, whether still inside the string, whether the next byte is escaped)."""
    at += escaped
    if end := _STRING_END.match(block, at):
        return end.end(), False, False
    tail = block[at:]
    return len(block), True, bool((len(tail) - len(tail.rstrip(b"\\"))) % 2)


class BadRow(NamedTuple):
    """Lines of a CSV file that are no row."""

    reason: str
    excerpt: str
    size: int


def csv_rows(data: Iterator[bytes], kind: str, limit: int) -> Iterator[tuple[list[str], int] | BadRow]:
    """(values, bytes) of the rows of a CSV or TSV file, header included. Bytes that are not UTF-8 come as surrogates.

    CSV as in RFC 4180; TSV as registered with IANA: a tab or a line end is never part of a field, a quote is a quote.
    A quote that is never closed costs the line that opens it; the lines after it are read on their own.
    """
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    feed = _Feed(streams.lines(data, limit=limit, lone_cr=True), limit)
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
    reader = csv.reader(feed, **style)  # type: ignore[arg-type]
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
            yield BadRow(feed.fault, first[:120].strip(), feed.long or len(first))
            feed.again.extendleft(reversed(feed.row[1:]))
            feed.fault, feed.long = "", 0
            reader = csv.reader(feed, **style)  # type: ignore[arg-type]
        elif values:
            yield values, size


class _Feed:
    """Lines for a csv.reader, which asks for another one inside a row only where a quote is open."""

    def __init__(self, lines: Iterator[tuple[int, bytes | int]], limit: int):
        self._lines, self._limit, self._size = lines, limit, 0
        self.row: list[str] = []
        self.again: deque[str] = deque()
        self.fault, self.long = "", 0

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        self._size = self._size if self.row else 0
        if self.row and self._size > self._limit:
            self.fault = f"a quote that stays open for more than {self._limit} bytes"
            raise StopIteration
        line = self.again.popleft() if self.again else next(self._lines, (0, None))[1]
        if line is None:
            self.fault = "the file ends inside a quote" if self.row else ""
            raise StopIteration
        if isinstance(line, int):
            self.fault, self.long = f"longer than {self._limit} bytes", line
            raise StopIteration
        text = line if isinstance(line, str) else line.decode("utf-8", "surrogateescape")
        self.row.append(text)
        self._size += len(text)
        return text


def as_bytes(column):
    """An Arrow column of any kind of text as large_binary, since texts may hold bytes that are no UTF-8; others as they
    are. Extension types and dictionaries are unwrapped."""
    import pyarrow

    while isinstance(column.type, pyarrow.BaseExtensionType) or pyarrow.types.is_dictionary(column.type):
        is_dictionary = pyarrow.types.is_dictionary(column.type)
        column = column.dictionary_decode() if is_dictionary else column.storage
    return column.cast(pyarrow.large_binary()) if is_text(column.type) else column


def is_text(kind) -> bool:
    """Whether an Arrow type holds text, under whatever wrapping."""
    import pyarrow

    while isinstance(kind, pyarrow.BaseExtensionType) or pyarrow.types.is_dictionary(kind):
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind.storage_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in names
