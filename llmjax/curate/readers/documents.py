"""Read the records of a unit one by one; unreadable records are rejected and counted."""

from collections.abc import Callable, Iterator
import csv
import datetime
import json
import math
import os
from typing import Any, NamedTuple

from llmjax.curate.readers import encodings, tables, warc
from llmjax.curate.readers.units import Unit, kind_of, list_units
from llmjax.data.readers import formats, records, sources, streams
from llmjax.data.readers.documents import EMPTY, MAX_TEXT_BYTES, Reject, cut_at_blank_lines
from llmjax.data.readers.sources import Item
from llmjax.data.readers.streams import MAX_RECORD, Damage
from llmjax.errors import UserError

__all__ = ["Record", "Reject", "Unit", "kind_of", "list_units", "read"]

CUT_OFF = "cut off"
UNREADABLE = "unreadable"
NO_PAGE = warc.NO_PAGE
_EXCERPT = 120
_ROWS = 256  # of Parquet and TFDS at a time


class Record(NamedTuple):
    """One document as it was given.

    id     the input's own, else INPUT:FILE with the place in the file; not trusted to be unique
    text   the text, or the whole page; it can be encoded as UTF-8
    kind   "text", "html", or "auto" where the input does not say which
    meta   the record's other fields, fit for JSON; `url` and `date` of a captured page
    notes  what was mended in reading, by name: count
    """

    id: str
    text: str
    kind: str
    meta: dict[str, Any]
    notes: dict[str, int]


def read(unit: Unit) -> Iterator[Record | Reject]:
    """The unit's records, and a Reject for each that is none, the same ones in the same order at every call.

    Never raises for what is in a file. Where a file is damaged, what precedes the damage is given first.
    Raises UserError for a file that the disk or its permissions do not let it read, or that is gone: it may come back.
    """
    for item in unit.items:
        try:
            yield from _READERS[unit.kind](item, unit)
        except (Damage, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # pyarrow raises OSError for damage too
                raise UserError(
                    f"curate.inputs.{unit.source}.path={unit.config.path!r}: {item.path} cannot be read "
                    f"({error.strerror}); fix it and rerun the command: finished parts are kept"
                ) from None
            lost = error.lost if isinstance(error, Damage) else 1
            yield Reject(f"{_name(item, unit)}#rest", UNREADABLE, str(error)[:_EXCERPT], lost)


def _name(item: Item, unit: Unit) -> str:
    name = item.path if unit.kind == "tfds" else os.path.relpath(item.path, unit.base or ".")
    return f"{unit.source}:{name}"


def _record(where: str, fields: dict, unit: Unit, notes: dict[str, int]) -> Record | Reject:
    """A record of named fields as a document."""
    config = unit.config
    given = fields.get(config.id_field)
    if isinstance(given, bytes):
        given = given.decode("utf-8", "replace")
    named = isinstance(given, str | int) and not isinstance(given, bool) and bool(str(given).strip())
    if named:
        where = encodings.mend_surrogates(str(given)).text or where
    if config.text_field not in fields:
        return Reject(where, f"no field {config.text_field!r}", repr(fields)[:_EXCERPT])
    text = fields[config.text_field]
    if isinstance(text, bytes):
        try:
            text = text.decode(encodings.codec_of(config.encoding) or "utf-8")
        except UnicodeDecodeError:
            return Reject(where, "not UTF-8", repr(text[:_EXCERPT]))
    if not isinstance(text, str):
        return Reject(where, f"field {config.text_field!r} is not a text", repr(text)[:_EXCERPT])
    mended = encodings.mend_surrogates(text)
    taken = (config.text_field, config.id_field) if named or given is None else (config.text_field,)
    try:
        others = {
            name: _jsonable(value)
            for name, value in fields.items()
            if name not in taken and ("*" in config.fields or name in config.fields)
        }
    except RecursionError:
        return Reject(where, "fields nested too deeply", repr(text[:_EXCERPT]))
    return _document(where, mended.text, config.content, unit, others, {**notes, **mended.notes})


def _document(
    where: str, text: str | None, kind: str, unit: Unit, meta: dict[str, Any], notes: dict[str, int]
) -> Record | Reject:
    if text is None:
        return Reject(where, "not text", "")
    if not text.strip():
        return Reject(where, EMPTY, repr(text[:_EXCERPT]))
    for name, value in (("licence", unit.config.licence), ("origin", unit.config.origin)):
        if value and not meta.get(name):
            meta[name] = value
    return Record(where, text, kind, meta, notes)


def _jsonable(value: Any) -> Any:
    """A value that JSON holds: bytes as text, dates in ISO 8601, arrays as lists, numbers that are none as null."""
    if isinstance(value, str):
        return value if value.isascii() else encodings.mend_surrogates(value).text
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return encodings.decode(value).text or value.hex()
    if isinstance(value, dict):
        return {str(_jsonable(key)): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _jsonable(value.tolist())
    return str(value)


def _read_text(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    name, config = _name(item, unit), unit.config
    data, notes = encodings.as_utf8(streams.blocks(item.path))
    whole = streams.UntilDamage(data)
    pieces = cut_at_blank_lines(whole, MAX_TEXT_BYTES)
    first = next(pieces, b"")
    second = next(pieces, b"")
    if not first and not whole.damage:
        yield Reject(name, EMPTY, "")
    declared = config.encoding or (encodings.likeliest(first) if second else "")
    number = 0
    while first:
        text, mended = encodings.decode(first, declared)
        last = not second
        cut = {CUT_OFF: 1} if last and whole.damage else {}
        yield _document(f"{name}#{number}" if number or second else name, text, "text", unit, {}, notes | mended | cut)
        first, second, number = second, next(pieces, b""), number + 1
    whole.check()


def _read_html(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    name = _name(item, unit)
    whole = streams.UntilDamage(streams.blocks(item.path))
    parts, size = [], 0
    for block in whole:
        parts.append(block)
        size += len(block)
        if size > MAX_RECORD:
            yield Reject(name, f"longer than {MAX_RECORD >> 20} MiB", "")
            return
    data = b"".join(parts)
    if data or not whole.damage:
        text, notes = encodings.decode(data, encodings.declared_in_page(data) or unit.config.encoding)
        cut = {CUT_OFF: 1} if whole.damage else {}
        yield _document(name, text, "html", unit, {}, notes | cut)
    whole.check()


def _lines(item: Item) -> tuple[Iterator[tuple[int, bytes | int]], dict[str, int]]:
    """((offset, line) for the lines that begin within the item, without blank ones; notes)."""
    if not item.begin:
        data, notes = encodings.as_utf8(streams.blocks(item.path))
        return _within(streams.lines(data, limit=MAX_RECORD), item.end), notes
    found = streams.lines(streams.blocks(item.path, item.begin - 1), item.begin - 1, MAX_RECORD)
    next(found, None)  # the line, or its end, that the unit before holds
    return _within(found, item.end), {}


def _within(lines: Iterator[tuple[int, bytes | int]], end: int | None) -> Iterator[tuple[int, bytes | int]]:
    for offset, line in lines:
        if end is not None and offset >= end:
            return
        if isinstance(line, int) or line.strip():
            yield offset, line


def _read_jsonl(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    lines, notes = _lines(item)
    yield from _of_json(lines, notes, item, unit)


def _read_json(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    data, notes = encodings.as_utf8(streams.blocks(item.path))
    yield from _of_json(records.json_elements(formats.without_mark(data), MAX_RECORD), notes, item, unit)


def _of_json(
    found: Iterator[tuple[int, bytes | int]], notes: dict[str, int], item: Item, unit: Unit
) -> Iterator[Record | Reject]:
    """Records of (offset, JSON), or of (offset, size) for one that is too long."""
    name, codec = _name(item, unit), encodings.codec_of(unit.config.encoding)
    for offset, data in found:
        where = f"{name}@{offset}"
        if isinstance(data, int):
            yield Reject(where, f"longer than {MAX_RECORD >> 20} MiB", "", data)
            continue
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            try:
                text = data.decode(codec or "utf-8")
            except UnicodeDecodeError:
                yield Reject(where, "not UTF-8", repr(data[:_EXCERPT]), len(data))
                continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            yield Reject(where, "not JSON", text.strip()[:_EXCERPT], len(data))
            continue
        if not isinstance(fields, dict):
            yield Reject(where, "not a JSON object", text.strip()[:_EXCERPT], len(data))
            continue
        yield _record(where, fields, unit, notes)


def _read_lines(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    name = _name(item, unit)
    lines, notes = _lines(item)
    for offset, line in lines:
        where = f"{name}@{offset}"
        if isinstance(line, int):
            yield Reject(where, f"longer than {MAX_RECORD >> 20} MiB", "")
            continue
        text, mended = encodings.decode(line.rstrip(b"\r\n"), unit.config.encoding)
        yield _document(where, text, unit.config.content, unit, {}, notes | mended)


def _read_csv(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    name, config = _name(item, unit), unit.config
    rows = tables.rows(item.path, unit.kind)
    row, columns, likely = -1, list(config.columns), tables.Cells(item.path, config.encoding)
    while True:
        try:
            values = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            row += 1
            yield Reject(f"{name}:{row}", "not CSV", str(error)[:_EXCERPT])
            continue
        if not columns:
            columns = [likely.cell(value, {}) for value in values]
            if config.text_field not in columns:
                yield Reject(name, f"no column {config.text_field!r}", ",".join(values)[:_EXCERPT])
                return
            continue
        if not values:
            continue  # a blank line
        row += 1
        notes: dict[str, int] = {}
        cells = [likely.cell(value, notes) for value in values]
        if len(cells) != len(columns):
            yield Reject(f"{name}:{row}", "wrong number of columns", ",".join(cells)[:_EXCERPT])
            continue
        yield _record(f"{name}:{row}", dict(zip(columns, cells, strict=True)), unit, notes)
    if row < 0:
        yield Reject(name, EMPTY, "")


def _read_parquet(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    import pyarrow
    import pyarrow.parquet

    name, config = _name(item, unit), unit.config
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(item.path) as file:
            names = file.schema_arrow.names
            if config.text_field not in names:
                yield Reject(name, f"no column {config.text_field!r}", ", ".join(names)[:_EXCERPT])
                return
            last = file.num_row_groups if item.end is None else item.end
            row = sum(file.metadata.row_group(group).num_rows for group in range(item.begin))
            wanted = {config.text_field, config.id_field, *config.fields}
            columns = None if "*" in config.fields else [column for column in names if column in wanted]
            for batch in file.iter_batches(_ROWS, list(range(item.begin, last)), columns=columns):
                # Of two columns of one name, the first.
                places = {column: place for place, column in reversed(list(enumerate(batch.schema.names)))}
                values = {column: tables.values(batch.column(place)) for column, place in places.items()}
                for at in range(batch.num_rows):
                    fields = {column: list_[at] for column, list_ in values.items()}
                    yield _record(f"{name}:{row}", fields, unit, {})
                    row += 1
    except pyarrow.ArrowException as error:
        yield Reject(f"{name}:{row}#rest", UNREADABLE, f"{type(error).__name__}: {error}"[:_EXCERPT])


def _read_tfds(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    source = sources.open_tfds(item.path, f"curate.inputs.{unit.source}.path={item.path!r}")
    assert item.end is not None
    for begin in range(item.begin, item.end, _ROWS):
        rows = range(begin, min(begin + _ROWS, item.end))
        for row, fields in zip(rows, source.__getitems__(list(rows)), strict=True):
            yield _record(f"{_name(item, unit)}:{row}", fields, unit, {})


def _read_warc(item: Item, unit: Unit) -> Iterator[Record | Reject]:
    name = _name(item, unit)
    for page in warc.pages(item.path):
        where = page.id or f"{name}:{page.row}"
        if isinstance(page, warc.Refused):
            yield Reject(where, page.reason, page.excerpt)
            continue
        declared = encodings.declared_in_header(page.content_type)
        if not declared and page.kind == "html":
            declared = encodings.declared_in_page(page.data)
        text, notes = encodings.decode(page.data, declared)
        meta = {field: value for field, value in (("url", page.url), ("date", page.date)) if value}
        yield _document(where, text, page.kind, unit, meta, notes)


_READERS: dict[str, Callable[[Item, Unit], Iterator[Record | Reject]]] = {
    "text": _read_text,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "csv": _read_csv,
    "tsv": _read_csv,
    "html": _read_html,
    "warc": _read_warc,
    "tfds": _read_tfds,
}
