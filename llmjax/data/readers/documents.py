"""Read the documents of a unit; records that are not text are rejected."""

from collections.abc import Iterable, Iterator
import json
import re
from typing import NamedTuple

from llmjax.data.readers import formats, records, streams
from llmjax.data.readers.sources import Item, Unit, open_tfds
from llmjax.data.store.split import SPLITS
from llmjax.errors import UserError

# A text file of more than twice this becomes several documents, cut at blank lines, so that memory stays bounded.
MAX_TEXT_BYTES = 1 << 24
EMPTY = "empty"
TRUNCATED = "truncated"  # of a source with accept_truncated
NO_FAULT = (EMPTY, TRUNCATED)  # reasons that do not count against data.max_bad_fraction
_BLANK_LINE = re.compile(rb"\n\r?\n[\r\n]*")
_EXCERPT = 120


class Document(NamedTuple):
    """One text: where it comes from, its characters, untouched, the same as UTF-8, and the split that is given."""

    id: str
    text: str
    data: bytes
    split: str = ""


class Reject(NamedTuple):
    """A record that is no document: where, why, the first characters of what was there, and its bytes, about."""

    id: str
    reason: str
    excerpt: str
    size: int = 0


def read_unit(unit: Unit, part_bytes: int | None = None) -> Iterator[Document | Reject]:
    """The unit's documents and rejects, the same ones in the same order at every call.

    part_bytes   cut documents at blank lines into parts of this size up to twice it; None: as they are
    """
    for item in unit.items:
        for record in _guarded(_READERS[unit.kind](item, unit), item, unit):
            if part_bytes is None or isinstance(record, Reject):
                yield record
            else:
                yield from _parts(record, part_bytes)


def cut_at_blank_lines(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Pieces of `size` to 2 * size bytes that together are the input: cut after a blank line, else after a line.

    A line longer than 2 * size is cut between two characters. Only the last piece may be shorter.
    """
    parts, length = [], 0
    for block in blocks:
        parts.append(block)
        length += len(block)
        if length > 2 * size:
            held = b"".join(parts)
            while len(held) > 2 * size:
                end = _cut_point(held, size)
                yield held[:end]
                held = held[end:]
            parts, length = [held], len(held)
    if length:
        yield b"".join(parts)


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


def _guarded(found: Iterator[Document | Reject], item: Item, unit: Unit) -> Iterator[Document | Reject]:
    """The records of a file. Raises UserError where it ends early or is broken, unless the source accepts that."""
    where = f"data.sources.{unit.source}"
    try:
        yield from found
    except streams.Damage as damage:
        if not unit.accept_truncated:
            raise UserError(
                f"{where}.path: {item.path} is damaged ({damage}), and what is missing cannot be measured; get the "
                f"file again, or set {where}.accept_truncated=true to use what precedes the damage"
            ) from None
        yield Reject(item.path, TRUNCATED, str(damage)[:_EXCERPT])
    except OSError as error:
        raise UserError(
            f"{where}.path: {item.path} cannot be read ({error.strerror or error}); fix that and run again: finished "
            "shards are kept"
        ) from None


def _document(where: str, data: bytes) -> Document | Reject:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Reject(where, "not UTF-8", repr(data[max(error.start - 40, 0) : error.start + 40]), len(data))
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
    data = streams.UntilDamage(formats.without_mark(streams.blocks(item.path)))
    pieces = cut_at_blank_lines(data, MAX_TEXT_BYTES)
    piece, number = next(pieces, b""), 0
    following = next(pieces, b"")
    name = f"{item.path}#{{}}" if following else item.path
    while True:
        if data.damage and not following:  # the last character may be cut
            piece = piece.decode("utf-8", "ignore").encode()
        yield _document(name.format(number), piece)
        if not following:
            break
        piece, following, number = following, next(pieces, b""), number + 1
    data.check()


def _read_jsonl(item: Item, unit: Unit) -> Iterator[Document | Reject]:
    begin = max(item.begin - 1, 0)
    found = streams.lines(streams.blocks(item.path, begin), begin, unit.max_record_bytes)
    number = 0
    if item.begin:
        next(found, None)  # the line, or its end, that the unit before holds
    for number, (offset, line) in enumerate(found, 1):
        if item.end is not None and offset >= item.end:
            return  # the line begins in the next unit
        where = f"{item.path}:{number}" if not item.begin else f"{item.path} byte {offset}"
        if isinstance(line, int) or line.strip():
            yield _of_json(where, line, unit)


def _read_json(item: Item, unit: Unit) -> Iterator[Document | Reject]:
    data = formats.without_mark(streams.blocks(item.path))
    for offset, value in records.json_elements(data, unit.max_record_bytes):
        yield _of_json(f"{item.path} byte {offset}", value, unit)


def _of_json(where: str, data: bytes | int, unit: Unit) -> Document | Reject:
    """A document of the JSON of one record, or of the size of one that is too long."""
    if isinstance(data, int):
        return _too_long(where, data, unit)
    record = _of_line(where, data, unit)
    return record._replace(size=len(data)) if isinstance(record, Reject) and record.reason != EMPTY else record


def _too_long(where: str, size: int, unit: Unit) -> Reject:
    return Reject(where, f"longer than {unit.max_record_bytes} bytes (max_record_bytes)", "", size)


def _read_csv(item: Item, unit: Unit) -> Iterator[Document | Reject]:
    columns: list[str] = []
    rows = records.csv_rows(formats.without_mark(streams.blocks(item.path)), unit.kind, unit.max_record_bytes)
    for number, row in enumerate(rows):
        where = f"{item.path}:{number}"
        if isinstance(row, records.BadRow):
            yield Reject(where, f"not {unit.kind.upper()}: {row.reason}", row.excerpt, row.size)
            continue
        values, size = row
        if not columns:
            columns = values
            if unit.text_field not in columns:
                _missing_column(columns, item, unit)
            continue
        if len(values) != len(columns):
            yield Reject(where, "wrong number of columns", repr(values)[:_EXCERPT], size)
            continue
        data = values[columns.index(unit.text_field)].encode("utf-8", "surrogateescape")
        yield _document(where, data) if size <= unit.max_record_bytes else _too_long(where, size, unit)


def _missing_column(columns: list[str], item: Item, unit: Unit) -> None:
    raise UserError(
        f"data.sources.{unit.source}.text_field={unit.text_field!r}: {item.path} has the columns "
        f"{', '.join(columns)[:300]}; name the one that holds the text"
    )


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
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise streams.Damage(_cause(error)) from None
    with file:
        _check_column(file.schema_arrow, item, unit)
        groups = range(item.begin, file.num_row_groups if item.end is None else item.end)
        row = sum(file.metadata.row_group(group).num_rows for group in range(item.begin))
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=[unit.text_field]):
                for value in records.as_bytes(batch.column(0)).to_pylist():
                    where = f"{item.path}:{row}"
                    if value is not None and len(value) > unit.max_record_bytes:
                        yield _too_long(where, len(value), unit)
                    else:
                        yield _of_value(where, value, unit.text_field)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk
            lost = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            yield Reject(f"{item.path}:{row}", "unreadable", _cause(error), lost)


def _check_column(schema, item: Item, unit: Unit) -> None:
    if unit.text_field not in schema.names:
        _missing_column(schema.names, item, unit)
    kind = schema.field(unit.text_field).type
    if not records.is_text(kind):
        raise UserError(
            f"data.sources.{unit.source}.text_field={unit.text_field!r}: {item.path} holds {kind} in that column, not "
            "text; name the column that holds the text"
        )


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


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_EXCERPT]


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "tfds": _read_tfds,
}
