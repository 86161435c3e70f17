"""Read the documents of a unit in strict mode, for `prepare`: records that are not text are rejected."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llmjax.data.config import SourceConfig
from llmjax.data.readers import raw_records, streams
from llmjax.data.readers.raw_records import Fault, RawRecord, ReadOptions
from llmjax.data.readers.records import EXCERPT
from llmjax.data.readers.sources import Item, Unit
from llmjax.data.store.split import SPLITS
from llmjax.errors import UserError

EMPTY = "empty"
TRUNCATED = "truncated"  # of a source with accept_truncated
UNREADABLE = "unreadable"
NO_FIELD = "no field"  # followed by the name of the text field that a record lacks
NO_FAULT = (EMPTY, TRUNCATED)  # reasons that do not count against data.max_bad_fraction


class Document(NamedTuple):
    """One text: its id, its unchanged characters, the same as UTF-8, and its split if the record names one."""

    id: str
    text: str
    data: bytes
    split: str = ""


class Reject(NamedTuple):
    """A record that is no document: its id, the reason, its first characters, and its approximate bytes."""

    id: str
    reason: str
    excerpt: str
    size: int = 0


def read_unit(unit: Unit[SourceConfig], part_bytes: int | None = None) -> Iterator[Document | Reject]:
    """The unit's documents and rejects, the same ones in the same order at every call.

    part_bytes   cut documents at blank lines into parts of this size up to twice it; None: as they are
    Raises UserError for a file that ends early, unless the source accepts that, and for one without the text field.
    """
    for item in unit.items:
        for record in _read_item(item, unit):
            if part_bytes is None or isinstance(record, Reject):
                yield record
                continue
            for number, data in enumerate(raw_records.cut_at_blank_lines([record.data], part_bytes)):
                part = _make_document(f"{record.id}#{number}", data.decode(), data)
                yield part._replace(split=record.split) if isinstance(part, Document) else part


def _read_item(item: Item, unit: Unit[SourceConfig]) -> Iterator[Document | Reject]:
    config, where = unit.config, f"data.sources.{unit.source}"
    options = ReadOptions(where, config.text_field, config.max_record_bytes)
    try:
        for raw in raw_records.read_item(unit.kind, item, options):
            record_id = f"{item.path}:{raw.line}" if raw.line else item.path + raw.location.replace("@", " byte ")
            record = _make_record(record_id, raw, config)
            is_bad = isinstance(record, Reject) and record.reason != EMPTY
            yield record._replace(size=raw.size) if is_bad else record
    except raw_records.ColumnsError as error:
        raise raw_records.make_columns_error(error, item, options) from None
    except streams.DamageError as damage:
        if not damage.truncated:
            yield Reject(item.path, UNREADABLE, str(damage)[:EXCERPT], damage.lost_bytes)
        elif config.accept_truncated:
            yield Reject(item.path, TRUNCATED, str(damage)[:EXCERPT])
        else:
            raise UserError(
                f"{where}.path: {item.path} is damaged ({damage}), and what is missing cannot be measured; get the "
                f"file again, or set {where}.accept_truncated=true to use what precedes the damage"
            ) from None


def _make_record(record_id: str, raw: RawRecord, config: SourceConfig) -> Document | Reject:
    content = raw.content
    if isinstance(content, Fault):
        return Reject(record_id, *content)
    if isinstance(content, str):
        return _make_document(record_id, content, content.encode())
    if config.text_field not in content:
        return Reject(record_id, f"{NO_FIELD} {config.text_field!r}", repr(content)[:EXCERPT])
    document = _parse_text_field(record_id, content[config.text_field], config.text_field)
    if not config.split_field or isinstance(document, Reject):
        return document
    if (split := content.get(config.split_field)) not in SPLITS:
        return Reject(record_id, f"field {config.split_field!r} names no split", repr(split)[:EXCERPT])
    return document._replace(split=split)


def _parse_text_field(record_id: str, value: Any, field: str) -> Document | Reject:
    if isinstance(value, bytes):
        try:
            return _make_document(record_id, value.decode(), value)
        except UnicodeDecodeError as error:
            return Reject(record_id, "not UTF-8", repr(value[max(error.start - 40, 0) : error.start + 40]))
    if not isinstance(value, str):
        return Reject(record_id, f"field {field!r} is not a text", repr(value)[:EXCERPT])
    try:
        return _make_document(record_id, value, value.encode())
    except UnicodeEncodeError:
        return Reject(record_id, "lone surrogate", repr(value)[:EXCERPT])


def _make_document(record_id: str, text: str, data: bytes) -> Document | Reject:
    return Document(record_id, text, data) if text.strip() else Reject(record_id, EMPTY, repr(text[:EXCERPT]))
