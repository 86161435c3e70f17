"""Reading the documents of a unit, and refusing what is no text, record by record."""

from collections.abc import Iterable, Iterator
import gzip
import io
import json
import re
from typing import BinaryIO, NamedTuple
import zlib

from llmjax.config import UserError
from llmjax.data.sources import Item, Unit, open_tfds
from llmjax.data.split import SPLITS

# A text file of more than twice this becomes several documents, cut at blank lines, so that memory stays bounded.
MAX_TEXT_BYTES = 1 << 24
EMPTY = "empty"  # the one reason that counts as no fault
_BLANK_LINE = re.compile(rb"\n\r?\n[\r\n]*")
_EXCERPT = 120


class Document(NamedTuple):
    """One text: where it comes from, its characters, untouched, the same as UTF-8, and the split that is given."""

    id: str
    text: str
    data: bytes
    split: str = ""


class Reject(NamedTuple):
    """A record that is no document: where, why, and the first characters of what was there."""

    id: str
    reason: str
    excerpt: str


def read_unit(unit: Unit, part_bytes: int | None = None) -> Iterator[Document | Reject]:
    """The unit's documents and rejects, the same ones in the same order at every call.

    part_bytes   cut documents at blank lines into parts of this size up to twice it; None: as they are
    """
    read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "tfds": _read_tfds}[unit.kind]
    for item in unit.items:
        for record in _guarded(read(item, unit), item):
            if part_bytes is None or isinstance(record, Reject):
                yield record
            else:
                yield from _parts(record, part_bytes)


def cut_at_blank_lines(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Pieces of `size` to 2 * size bytes that together are the input: cut after a blank line, else after a line.

    A line longer than 2 * size is cut between two characters. Only the last piece may be shorter.
    """
    held = b""
    for block in blocks:
        held += block
        while len(held) > 2 * size:
            end = _cut_point(held, size)
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _cut_point(data: bytes, size: int) -> int:
    if blank := _BLANK_LINE.search(data, size - 1, 2 * size):
        return blank.end()
    if line := data.rfind(b"\n", size, 2 * size) + 1:
        return line
    end = 2 * size
    while end > size and data[end] & 0xC0 == 0x80:  # a continuation byte: the character began before
        end -= 1
    return end


def _parts(document: Document, size: int) -> Iterator[Document | Reject]:
    for number, data in enumerate(cut_at_blank_lines([document.data], size)):
        part = _document(f"{document.id}#{number}", data)
        yield part._replace(split=document.split) if isinstance(part, Document) else part


def _guarded(records: Iterator[Document | Reject], item: Item) -> Iterator[Document | Reject]:
    """What was read before a file turned out to be unreadable, then one reject for the rest of it."""
    try:
        yield from records
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        yield Reject(item.path, "unreadable", _cause(error))


def _document(where: str, data: bytes) -> Document | Reject:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Reject(where, "not UTF-8", repr(data[max(error.start - 40, 0) : error.start + 40]))
    return _checked(where, text, data)


def _checked(where: str, text: str, data: bytes) -> Document | Reject:
    return Document(where, text, data) if text.strip() else Reject(where, EMPTY, repr(text[:_EXCERPT]))


def _of_value(where: str, value: object, field: str) -> Document | Reject:
    """A record's field as a document."""
    if isinstance(value, bytes):
        return _document(where, value)
    if not isinstance(value, str):
        return Reject(where, f"field {field!r} is not a text", repr(value)[:_EXCERPT])
    try:
        data = value.encode()
    except UnicodeEncodeError:
        return Reject(where, "lone surrogate", repr(value)[:_EXCERPT])
    return _checked(where, value, data)


def _read_text(item: Item, unit: Unit) -> Iterator[Document | Reject]:
    with _open(item.path) as file:
        first = file.read(2 * MAX_TEXT_BYTES + 1)
        if len(first) <= 2 * MAX_TEXT_BYTES:
            yield _document(item.path, first)
            return
        rest = iter(lambda: file.read(MAX_TEXT_BYTES), b"")
        for number, data in enumerate(cut_at_blank_lines(_chain(first, rest), MAX_TEXT_BYTES)):
            yield _document(f"{item.path}#{number}", data)


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _read_jsonl(item: Item, unit: Unit) -> Iterator[Document | Reject]:
    with _open(item.path) as file:
        offset = _first_line(file, item.begin) if item.begin else 0
        for number, line in enumerate(file, 1):
            if item.end is not None and offset >= item.end:
                return  # the line begins in the next unit
            where = f"{item.path}:{number}" if not item.begin else f"{item.path} byte {offset}"
            offset += len(line)
            if line.strip():
                yield _of_line(where, line, unit)


def _first_line(file: BinaryIO, begin: int) -> int:
    """Go to the first line that begins at or after `begin`; returns where that is."""
    file.seek(begin - 1)
    return begin - 1 + len(file.readline())


def _of_line(where: str, line: bytes, unit: Unit) -> Document | Reject:
    field = unit.text_field
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Reject(where, "not UTF-8", repr(line[:_EXCERPT]))
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Reject(where, "not JSON", text.strip()[:_EXCERPT])
    if not isinstance(record, dict):
        return Reject(where, "not a JSON object", text.strip()[:_EXCERPT])
    if field not in record:
        return Reject(where, f"no field {field!r}", text.strip()[:_EXCERPT])
    made = _of_value(where, record[field], field)
    if not unit.split_field or isinstance(made, Reject):
        return made
    if (split := record.get(unit.split_field)) not in SPLITS:
        return Reject(where, f"field {unit.split_field!r} names no split", repr(split)[:_EXCERPT])
    return made._replace(split=split)


def _read_parquet(item: Item, unit: Unit) -> Iterator[Document | Reject]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(item.path)
    except pyarrow.ArrowException as error:
        yield Reject(item.path, "unreadable", _cause(error))
        return
    with file:
        _check_column(file.schema_arrow, item, unit)
        groups = range(item.begin, file.num_row_groups if item.end is None else item.end)
        row = sum(file.metadata.row_group(group).num_rows for group in range(item.begin))
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=[unit.text_field]):
                column = batch.column(0)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes, since a string column may hold bytes that are no UTF-8.
                for value in column.cast(pyarrow.large_binary()).to_pylist():
                    yield _of_value(f"{item.path}:{row}", value, unit.text_field)
                    row += 1
        except pyarrow.ArrowException as error:
            yield Reject(f"{item.path}:{row}", "unreadable", _cause(error))


def _check_column(schema, item: Item, unit: Unit) -> None:
    import pyarrow

    where = f"data.sources.{unit.source}.text_field={unit.text_field!r}: {item.path}"
    if unit.text_field not in schema.names:
        raise UserError(f"{where} has the columns {', '.join(schema.names)}; name the one that holds the text")
    kind = schema.field(unit.text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
    if kind not in texts:
        raise UserError(f"{where} holds {kind} in that column, not text; name the column that holds the text")


def _read_tfds(item: Item, unit: Unit) -> Iterator[Document | Reject]:
    source = open_tfds(item.path, f"data.sources.{unit.source}.path={item.path!r}")
    assert item.end is not None
    for begin in range(item.begin, item.end, 256):
        rows = range(begin, min(begin + 256, item.end))
        for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
            if unit.text_field not in record:
                raise UserError(
                    f"data.sources.{unit.source}.text_field={unit.text_field!r}: {item.path} has the fields "
                    f"{', '.join(record)}; name the one that holds the text"
                )
            yield _of_value(f"{item.path}:{row}", record[unit.text_field], unit.text_field)


def _open(path: str) -> BinaryIO:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    return io.BufferedReader(_Zstandard(file), 1 << 20) if path.lower().endswith(".zst") else file  # type: ignore[return-value]


class _Zstandard(io.RawIOBase):
    """A .zst file's content. Raises EOFError where the file ends inside a frame, which the library passes over."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._file, self._errors = file, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame, self._ready, self._inside = self._new(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            block = self._frame.unused_data if self._frame.eof else b""
            block = block or self._file.read(1 << 18)
            if not block:
                if self._inside:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            try:
                self._ready = self._frame.decompress(block)
            except self._errors as error:
                raise OSError(str(error)) from None
            self._inside = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_EXCERPT]
