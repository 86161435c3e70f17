"""Read the records of a unit in lenient mode: repair what can be repaired, reject the rest with a reason."""

from collections.abc import Iterator
import datetime
import math
import os
from typing import Any, NamedTuple

from llmjax.curate.config import InputConfig
from llmjax.curate.readers import warc
from llmjax.curate.readers.inputs import read_options
from llmjax.data.readers import encodings, raw_records, streams
from llmjax.data.readers.documents import EMPTY, NO_FIELD, UNREADABLE, Reject
from llmjax.data.readers.raw_records import CUT_OFF, ColumnsError, Fault
from llmjax.data.readers.records import EXCERPT
from llmjax.data.readers.sources import Item, Unit


class Record(NamedTuple):
    """One document of an input, before curation.

    id     from the record, else INPUT:FILE with the position in the file; not necessarily unique
    text   the text or the page; without surrogates
    kind   "text", "html", or "auto" if the input does not say which
    meta   the record's other fields, as JSON values; `url` and `date` of a captured page
    notes  name of a repair -> count
    """

    id: str
    text: str
    kind: str
    meta: dict[str, Any]
    notes: dict[str, int]


def read_unit(unit: Unit[InputConfig]) -> Iterator[Record | Reject]:
    """The unit's records, and a Reject for each unreadable one, in the same order at every call.

    Damaged content does not raise: the records before it are yielded. Raises UserError if the disk or the permissions
    prevent reading, and for a missing file, because it may be readable later.
    """
    for item in unit.items:
        name = item.path if unit.kind == "tfds" else os.path.relpath(item.path, unit.base or ".")
        name = f"{unit.source}:{name}"
        try:
            yield from _READERS.get(unit.kind, _read_records)(item, name, unit)
        except ColumnsError as error:
            reason = f"no column {unit.config.text_field!r}"
            yield Reject(name, reason, str(error)[:EXCERPT], unit.size // len(unit.items))
        except streams.DamageError as damage:
            yield Reject(f"{name}#rest", UNREADABLE, str(damage)[:EXCERPT], damage.lost_bytes)


def _read_records(item: Item, name: str, unit: Unit[InputConfig]) -> Iterator[Record | Reject]:
    kind = "text" if unit.kind == "text" else unit.config.content
    for raw in raw_records.read_item(unit.kind, item, read_options(unit)):
        id, notes = name + raw.location, dict(raw.notes)
        if isinstance(raw.content, Fault):
            yield Reject(id, *raw.content, raw.size)
        elif isinstance(raw.content, str):
            yield _to_record(id, raw.content, kind, unit, {}, notes)
        else:
            record = _make_record(id, raw.content, unit, notes)
            is_bad = isinstance(record, Reject) and record.reason != EMPTY
            yield record._replace(size=raw.size) if is_bad else record


def _read_html(item: Item, name: str, unit: Unit[InputConfig]) -> Iterator[Record | Reject]:
    with raw_records.explain_os_errors(item.path, f"curate.inputs.{unit.source}"):
        options = read_options(unit)
        blocks = streams.UntilDamage(streams.read_blocks(item.path))
        parts, size = [], 0
        for block in blocks:
            size += len(block)
            if size <= options.max_record_bytes:
                parts.append(block)
            else:
                parts = []
        if size > options.max_record_bytes:
            yield Reject(name, *options.length_fault(size), size)
        elif size or not blocks.damage:
            data = b"".join(parts)
            content, notes = options.decode(data, encodings.find_page_encoding(data) or unit.config.encoding)
            cut_off = {CUT_OFF: 1} if blocks.damage else {}
            yield _to_record(name, content, "html", unit, {}, {**notes, **cut_off})
        blocks.check()


def _read_warc(item: Item, name: str, unit: Unit[InputConfig]) -> Iterator[Record | Reject]:
    with raw_records.explain_os_errors(item.path, f"curate.inputs.{unit.source}"):
        options = read_options(unit)
        for page in warc.read_pages(item.path, options.max_record_bytes):
            id = page.id or f"{name}:{page.row}"
            if isinstance(page, warc.RejectedPage):
                yield Reject(id, page.reason, page.excerpt, page.size)
                continue
            declared = encodings.find_header_encoding(page.content_type)
            if not declared and page.kind == "html":
                declared = encodings.find_page_encoding(page.data)
            content, notes = options.decode(page.data, declared)
            meta = {field: value for field, value in (("url", page.url), ("date", page.date)) if value}
            yield _to_record(id, content, page.kind, unit, meta, dict(notes))


_READERS = {"html": _read_html, "warc": _read_warc}


def _make_record(
    default_id: str, fields: dict[str, Any], unit: Unit[InputConfig], notes: dict[str, int]
) -> Record | Reject:
    config = unit.config
    value = fields.get(config.id_field)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    has_id = isinstance(value, str | int) and not isinstance(value, bool) and bool(str(value).strip())
    id = encodings.replace_surrogates(str(value)).text or default_id if has_id else default_id
    if config.text_field not in fields:
        return Reject(id, f"{NO_FIELD} {config.text_field!r}", repr(fields)[:EXCERPT])
    text = fields[config.text_field]
    if isinstance(text, bytes):
        try:
            text = text.decode(encodings.find_codec(config.encoding) or "utf-8")
        except UnicodeDecodeError:
            return Reject(id, "not UTF-8", repr(text[:EXCERPT]))
    if not isinstance(text, str):
        return Reject(id, f"field {config.text_field!r} is not a text", repr(text)[:EXCERPT])
    repaired = encodings.replace_surrogates(text)
    own_fields = (config.text_field, config.id_field) if has_id or value is None else (config.text_field,)
    try:
        meta = {
            name: _to_json(value)
            for name, value in fields.items()
            if name not in own_fields and ("*" in config.fields or name in config.fields)
        }
    except RecursionError:
        return Reject(id, "fields nested too deeply", repr(text[:EXCERPT]))
    return _to_record(id, repaired.text or "", config.content, unit, meta, {**notes, **repaired.notes})


def _to_record(
    id: str, text: str | Fault, kind: str, unit: Unit[InputConfig], meta: dict[str, Any], notes: dict[str, int]
) -> Record | Reject:
    if isinstance(text, Fault):
        return Reject(id, *text)
    if not text.strip():
        return Reject(id, EMPTY, repr(text[:EXCERPT]))
    for name, value in (("licence", unit.config.licence), ("origin", unit.config.origin)):
        if value and not meta.get(name):
            meta[name] = value
    return Record(id, text, kind, meta, notes)


def _to_json(value: Any) -> Any:
    """A JSON value: bytes become text, dates ISO 8601 strings, arrays lists, infinite numbers and NaN null."""
    if isinstance(value, str):
        return value if value.isascii() else encodings.replace_surrogates(value).text
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return encodings.decode(value).text or value.hex()
    if isinstance(value, dict):
        return {str(_to_json(key)): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_to_json(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _to_json(value.tolist())
    return str(value)
