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
from llmjax.data.readers.documents import EMPTY, UNREADABLE, Reject
from llmjax.data.readers.raw_records import CUT_OFF, ColumnsError, Fault
from llmjax.data.readers.records import EXCERPT
from llmjax.data.readers.sources import Item, Unit


class Record(NamedTuple):
    """One document as the input has it.

    id     the input's own, else INPUT:FILE with the place in the file; may not be unique
    text   the text, or the whole page; it can be encoded as UTF-8
    kind   "text", "html", or "auto" if the input does not say which
    meta   the record's other fields, as JSON values; `url` and `date` of a captured page
    notes  what was repaired in reading: name -> count
    """

    id: str
    text: str
    kind: str
    meta: dict[str, Any]
    notes: dict[str, int]


def read_unit(unit: Unit[InputConfig]) -> Iterator[Record | Reject]:
    """The unit's records, and a Reject for each that is not readable, the same ones in the same order at every call.

    The content of a file never raises. What precedes damage is yielded first. Raises UserError if the disk or the
    permissions prevent reading, and for a file that is gone: it may be readable later.
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
        place, notes = name + raw.location, dict(raw.notes)
        if isinstance(raw.content, Fault):
            yield Reject(place, *raw.content, raw.size)
        elif isinstance(raw.content, str):
            yield _to_record(place, raw.content, kind, unit, {}, notes)
        else:
            record = _from_fields(place, raw.content, unit, notes)
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
        for page in warc.pages(item.path, options.max_record_bytes):
            place = page.id or f"{name}:{page.row}"
            if isinstance(page, warc.RejectedPage):
                yield Reject(place, page.reason, page.excerpt, page.size)
                continue
            declared = encodings.find_header_encoding(page.content_type)
            if not declared and page.kind == "html":
                declared = encodings.find_page_encoding(page.data)
            content, notes = options.decode(page.data, declared)
            meta = {field: value for field, value in (("url", page.url), ("date", page.date)) if value}
            yield _to_record(place, content, page.kind, unit, meta, dict(notes))


_READERS = {"html": _read_html, "warc": _read_warc}


def _from_fields(place: str, fields: dict[str, Any], unit: Unit[InputConfig], notes: dict[str, int]) -> Record | Reject:
    config = unit.config
    id = fields.get(config.id_field)
    if isinstance(id, bytes):
        id = id.decode("utf-8", "replace")
    has_id = isinstance(id, str | int) and not isinstance(id, bool) and bool(str(id).strip())
    if has_id:
        place = encodings.replace_surrogates(str(id)).text or place
    if config.text_field not in fields:
        return Reject(place, f"no field {config.text_field!r}", repr(fields)[:EXCERPT])
    text = fields[config.text_field]
    if isinstance(text, bytes):
        try:
            text = text.decode(encodings.find_codec(config.encoding) or "utf-8")
        except UnicodeDecodeError:
            return Reject(place, "not UTF-8", repr(text[:EXCERPT]))
    if not isinstance(text, str):
        return Reject(place, f"field {config.text_field!r} is not a text", repr(text)[:EXCERPT])
    repaired = encodings.replace_surrogates(text)
    own_fields = (config.text_field, config.id_field) if has_id or id is None else (config.text_field,)
    try:
        meta = {
            name: _to_json(value)
            for name, value in fields.items()
            if name not in own_fields and ("*" in config.fields or name in config.fields)
        }
    except RecursionError:
        return Reject(place, "fields nested too deeply", repr(text[:EXCERPT]))
    return _to_record(place, repaired.text or "", config.content, unit, meta, {**notes, **repaired.notes})


def _to_record(
    place: str, text: str | Fault, kind: str, unit: Unit[InputConfig], meta: dict[str, Any], notes: dict[str, int]
) -> Record | Reject:
    if isinstance(text, Fault):
        return Reject(place, *text)
    if not text.strip():
        return Reject(place, EMPTY, repr(text[:EXCERPT]))
    for name, value in (("licence", unit.config.licence), ("origin", unit.config.origin)):
        if value and not meta.get(name):
            meta[name] = value
    return Record(place, text, kind, meta, notes)


def _to_json(value: Any) -> Any:
    """A JSON value: bytes become text, dates ISO 8601, arrays lists, infinite numbers and NaN null."""
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
