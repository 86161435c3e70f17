"""Read the records of a file of any format, before a command turns them into documents.

`prepare` reads in strict mode: text is UTF-8, or the record is a fault. `curate` reads in lenient mode: text in any
encoding is decoded, and what was repaired is counted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import re
from typing import Any, NamedTuple

from llmjax.data.readers import encodings, formats, records, streams
from llmjax.data.readers.records import EXCERPT
from llmjax.data.readers.sources import Item, open_tfds
from llmjax.errors import UserError

# A text file of more than twice this becomes several documents, cut at blank lines, so that memory stays bounded.
MAX_TEXT_BYTES = 1 << 24
COLUMN_FORMATS = ("parquet", "csv", "tsv", "tfds")
CUT_OFF = "cut off"  # note of a text whose end is missing
_BLANK_LINE = re.compile(rb"\n\r?\n[\r\n]*")
_BATCH = 256  # rows of Parquet and TFDS that are read at once


class Fault(NamedTuple):
    """Why a record cannot be read, and its first characters."""

    reason: str
    excerpt: str


class RawRecord(NamedTuple):
    """One record of a file.

    location    where it is: "" for a whole file, "#2" for a part of a text, "@120" for a byte offset, ":7" for a row
    content  text, or fields by name; a field that is not UTF-8 is bytes
    size     bytes in the file; 0 if unknown
    line     its line from 1; 0 if unknown
    notes    what was repaired in reading: name -> count
    """

    location: str
    content: str | dict[str, Any] | Fault
    size: int = 0
    line: int = 0
    notes: Mapping[str, int] = {}


class ColumnsError(Exception):
    """A file lacks the column of the text, or the column has another type. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How the records of a source are read.

    where             the config of the source, for error messages: "data.sources.main"
    text_field        the field that holds the text; "": records need no text field
    max_record_bytes  a longer record is a fault; text files are not records
    is_lenient        decode any encoding; else text is UTF-8
    encoding          declared for files that are not UTF-8 (lenient)
    columns           of CSV and TSV files without a header line
    fields            other columns of Parquet to read; ("*",): all
    """

    where: str
    text_field: str = "text"
    max_record_bytes: int = 1 << 26
    is_lenient: bool = False
    encoding: str = ""
    columns: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def decode(self, data: bytes, declared: str = "") -> tuple[str | Fault, Mapping[str, int]]:
        """(text, notes of what was repaired)."""
        if self.is_lenient:
            text, notes = encodings.decode(data, declared)
            return (Fault("not text", "") if text is None else text), notes
        try:
            return data.decode(), {}
        except UnicodeDecodeError as error:
            return Fault("not UTF-8", repr(data[max(error.start - 40, 0) : error.start + 40])), {}

    def utf8_blocks(self, path: str, keep_bom: bool = False) -> tuple[Iterator[bytes], Mapping[str, int]]:
        """(the content, notes). Lenient: UTF-16 and UTF-32 with a byte order mark are converted to UTF-8."""
        data, notes = streams.read_blocks(path), {}
        if self.is_lenient:
            data, notes = encodings.convert_to_utf8(data)
        return (data if keep_bom else formats.strip_bom(data)), notes

    def length_fault(self, size: int) -> Fault:
        """The fault of a record of `size` bytes, above the limit."""
        return Fault(f"longer than {self.max_record_bytes} bytes (max_record_bytes)", "")


def read_item(kind: str, item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    """The records of an item, the same ones in the same order at every call.

    Raises streams.DamageError after the last record of a truncated or corrupt file, ColumnsError for a table without
    the text field, and UserError if the disk or the permissions prevent reading: then the file may be readable later.
    """
    with explain_os_errors(item.path, options.where):
        yield from _READERS[kind](item, options)


@contextlib.contextmanager
def explain_os_errors(path: str, where: str) -> Iterator[None]:
    """Raise a UserError in place of an OSError of the disk, and DamageError in place of one that pyarrow raises."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise streams.DamageError(_describe(error), 1) from None
        raise UserError(
            f"{where}.path: {path} cannot be read ({error.strerror or error}); fix it and rerun the command: finished "
            "parts are kept"
        ) from None


def check_columns(kind: str, item: Item, options: ReadOptions) -> None:
    """Raise UserError if a table lacks the text field. A damaged file is left to its reader."""
    try:
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            with contextlib.suppress(pyarrow.ArrowException, OSError):
                _check_schema(pyarrow.parquet.read_schema(item.path), options)
        elif kind in ("csv", "tsv", "tfds"):
            next(read_item(kind, item, options), None)
    except ColumnsError as error:
        raise make_columns_error(error, item, options) from None
    except streams.DamageError:
        pass


def make_columns_error(error: ColumnsError, item: Item, options: ReadOptions) -> UserError:
    """The error that names the field, the file and its columns."""
    return UserError(f"{options.where}.text_field={options.text_field!r}: {item.path} {error}")


def cut_at_blank_lines(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Pieces of `size` to 2 * size bytes that together are the input: cut after a blank line, else after a line.

    A line longer than 2 * size is cut between two characters. Only the last piece may be shorter.
    """
    parts, length = [], 0
    for block in blocks:
        parts.append(block)
        length += len(block)
        if length > 2 * size:
            data = b"".join(parts)
            while len(data) > 2 * size:
                end = _cut_point(data, size)
                yield data[:end]
                data = data[end:]
            parts, length = [data], len(data)
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


def _read_text(item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    data, notes = options.utf8_blocks(item.path, keep_bom=options.is_lenient)  # lenient decoding needs it
    data = streams.UntilDamage(data)
    pieces = cut_at_blank_lines(data, MAX_TEXT_BYTES)
    piece, following, number = next(pieces, b""), next(pieces, b""), 0
    # All pieces have one encoding.
    declared = options.encoding or (encodings.detect_encoding(piece) if following and options.is_lenient else "")
    location = "#{}" if following else ""
    while piece or not (number or data.damage):  # an empty file is one empty text
        is_cut_off = bool(data.damage) and not following
        if is_cut_off and not options.is_lenient:
            piece = piece.decode("utf-8", "ignore").encode()  # the last character may be cut
        content, repaired = options.decode(piece, declared)
        cut_off = {CUT_OFF: 1} if is_cut_off else {}
        yield RawRecord(location.format(number), content, len(piece), 0, {**notes, **repaired, **cut_off})
        piece, following, number = following, next(pieces, b""), number + 1
    data.check()


def _read_unsupported(item: Item, _: ReadOptions) -> Iterator[RawRecord]:
    reason = formats.explain_unsupported(item.path)
    yield RawRecord("", Fault(f"not text: {reason}", ""), os.stat(item.path).st_size)


def _split_item(item: Item, options: ReadOptions) -> Iterator[tuple[int, int, bytes | int, Mapping[str, int]]]:
    """(number, offset, line, notes) of the lines that begin within the item, without blank ones.

    The number is from 1, and 0 in an item that is not the first of its file.
    """
    notes: Mapping[str, int] = {}
    if item.begin:
        # A line that begins earlier belongs to the item before.
        begin = streams.find_line_begin(item.path, item.begin - 1, item.end)
        if begin is None:
            return
        lines = streams.split_lines(streams.read_blocks(item.path, begin), begin, max_bytes=options.max_record_bytes)
    else:  # a byte order mark stays: without it, offsets would not be those of the file
        data, notes = options.utf8_blocks(item.path, keep_bom=True)
        lines = streams.split_lines(data, max_bytes=options.max_record_bytes)
    for number, (offset, line) in enumerate(lines, 1):
        if item.end is not None and offset >= item.end:
            return
        if isinstance(line, int) or line.removeprefix(formats.UTF8_BOM).strip():
            yield (0 if item.begin else number), offset, line, notes


def _read_lines(item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    for number, offset, line, notes in _split_item(item, options):
        if isinstance(line, int):
            yield RawRecord(f"@{offset}", options.length_fault(line), line, number)
            continue
        content, repaired = options.decode(line.rstrip(b"\r\n"), options.encoding)
        yield RawRecord(f"@{offset}", content, len(line), number, {**notes, **repaired})


def _read_jsonl(item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    for number, offset, line, notes in _split_item(item, options):
        yield _make_json_record(f"@{offset}", line, options, number, notes)


def _read_json(item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    data, notes = options.utf8_blocks(item.path)
    for offset, value in records.split_json(data, options.max_record_bytes):
        yield _make_json_record(f"@{offset}", value, options, 0, notes)


def _make_json_record(
    location: str, data: bytes | int, options: ReadOptions, line: int, notes: Mapping[str, int]
) -> RawRecord:
    """A record of its JSON, or of the size of JSON that is too long."""
    if isinstance(data, int):
        return RawRecord(location, options.length_fault(data), data, line)
    return RawRecord(location, _parse_object(data, options), len(data), line, notes)


def _parse_object(data: bytes, options: ReadOptions) -> dict[str, Any] | Fault:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode(encodings.find_codec(options.encoding) or "utf-8")
        except UnicodeDecodeError:
            return Fault("not UTF-8", repr(data[:EXCERPT]))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Fault("not JSON", text.strip()[:EXCERPT])
    return value if isinstance(value, dict) else Fault("not a JSON object", text.strip()[:EXCERPT])


def _read_csv(kind: str, item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    data, _ = options.utf8_blocks(item.path)
    repair = _CellRepair(item.path, options)
    columns: list[str | bytes] = list(options.columns)
    if columns:
        _check_names(columns, options)
    hint = ", or name the columns of files without a header line in `columns`" if options.is_lenient else ""
    number = 0
    text_field = "" if columns else options.text_field
    for row in records.parse_csv(data, kind, options.max_record_bytes, text_field):
        if isinstance(row, records.BadRow):
            yield RawRecord(f":{number}", Fault(f"not {kind.upper()}: {row.reason}", row.excerpt), row.size)
            number += 1
            continue
        values, size = row
        notes: dict[str, int] = {}
        cells = [repair(value, notes) for value in values]
        if not columns:
            columns = cells
            _check_names(columns, options, hint)
            continue
        if size > options.max_record_bytes:
            content: dict[str, Any] | Fault = options.length_fault(size)
        elif len(cells) != len(columns):
            content = Fault("wrong number of columns", ",".join(values)[:EXCERPT])
        else:
            content = dict(zip(map(str, columns), cells, strict=True))
        yield RawRecord(f":{number}", content, size, 0, notes)
        number += 1
    if not number:
        yield RawRecord("", "")


class _CellRepair:
    """Decodes cells that are not UTF-8: in lenient mode by one encoding for the whole file, else to bytes."""

    def __init__(self, path: str, options: ReadOptions):
        self._path, self._is_lenient, self._encoding = path, options.is_lenient, options.encoding

    def __call__(self, value: str, notes: dict[str, int]) -> str | bytes:
        if value.isascii():
            return value
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            data = value.encode("utf-8", "surrogateescape")
        if not self._is_lenient:
            return data
        if not self._encoding:
            self._encoding = encodings.detect_encoding(next(streams.read_blocks(self._path), b""))
        text, repaired = encodings.decode(data, self._encoding)
        for name, count in repaired.items():
            notes[name] = max(notes.get(name, 0), count)
        return text or ""


def _check_names(names: Iterable[Any], options: ReadOptions, hint: str = "") -> None:
    if options.text_field and options.text_field not in names:
        listed = ", ".join(map(str, names))[:300]
        raise ColumnsError(f"has the columns {listed}; name the one that holds the text{hint}")


def _check_schema(schema: Any, options: ReadOptions) -> None:
    _check_names(schema.names, options)
    if not options.text_field:
        return
    kind = schema.field(schema.names.index(options.text_field)).type
    if not records.is_text(kind):
        raise ColumnsError(f"holds {kind} in that column, not text; name the column that holds the text")


def _read_parquet(item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    import pyarrow
    import pyarrow.parquet

    row, lost_bytes, is_open = 0, 0, False
    try:
        with pyarrow.parquet.ParquetFile(item.path) as file:
            names = file.schema_arrow.names
            _check_schema(file.schema_arrow, options)
            groups = range(item.begin, file.num_row_groups if item.end is None else item.end)
            lost_bytes = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            row = sum(file.metadata.row_group(group).num_rows for group in range(item.begin))
            is_open = True
            selected = {options.text_field, *options.fields}
            columns = None if "*" in options.fields else [name for name in names if name in selected]
            for batch in file.iter_batches(_BATCH, list(groups), columns=columns):
                # Of two columns with one name, the first.
                indices = {name: index for index, name in reversed(list(enumerate(batch.schema.names)))}
                values = {name: records.read_column(batch.column(index)) for name, index in indices.items()}
                for index in range(batch.num_rows):
                    fields = {name: column[index] for name, column in values.items()}
                    text = fields.get(options.text_field)
                    size = len(text) if isinstance(text, bytes) else 0
                    is_long = size > options.max_record_bytes
                    yield RawRecord(f":{row}", options.length_fault(size) if is_long else fields, size)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise streams.DamageError(_describe(error), lost_bytes or 1, truncated=not is_open) from None


def _read_tfds(item: Item, options: ReadOptions) -> Iterator[RawRecord]:
    source = open_tfds(item.path, f"{options.where}.path={item.path!r}")
    assert item.end is not None
    for begin in range(item.begin, item.end, _BATCH):
        rows = range(begin, min(begin + _BATCH, item.end))
        for row, fields in zip(rows, source.__getitems__(list(rows)), strict=True):
            _check_names(fields, options)
            yield RawRecord(f":{row}", fields)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:EXCERPT]


_READERS: dict[str, Callable[[Item, ReadOptions], Iterator[RawRecord]]] = {
    "text": _read_text,
    formats.UNSUPPORTED: _read_unsupported,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": lambda item, options: _read_csv("csv", item, options),
    "tsv": lambda item, options: _read_csv("tsv", item, options),
    "parquet": _read_parquet,
    "tfds": _read_tfds,
}
