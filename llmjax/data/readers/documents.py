"""Read the documents of a unit in strict mode, for `prepare`: records that are not text are rejected."""

from collections.abc import Iterator
import json
from typing import Any, NamedTuple

from llmjax.data.config import SourceConfig
from llmjax.data.readers import raw_records, streams
from llmjax.data.readers.dialogues import NO_FIELD, Dialogue, DialogueError, read_dialogue
from llmjax.data.readers.raw_records import Fault, RawRecord, ReadOptions
from llmjax.data.readers.records import EXCERPT
from llmjax.data.readers.sources import Item, Unit
from llmjax.data.store.split import SPLITS
from llmjax.errors import UserError

EMPTY = "empty"
TRUNCATED = "truncated"  # of a source with accept_truncated
UNREADABLE = "unreadable"
NO_FAULT = (EMPTY, TRUNCATED)  # reasons that do not count against data.max_bad_fraction


class Document(NamedTuple):
    """One text: its id, its unchanged characters, the same as UTF-8, and its split if the record names one.

    others    the other texts of a record of several, which are part of `data` as well, in the order of SourceConfig's
              fields
    label     the label or the score as in the record; None: the source has neither
    dialogue  the turns, whose contents are the text; None: plain text
    is_chat   whether the texts are lists of messages, as JSON
    """

    id: str
    text: str
    data: bytes
    split: str = ""
    others: tuple[str, ...] = ()
    label: Any = None
    dialogue: Dialogue | None = None
    is_chat: bool = False


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
            if part_bytes is None or isinstance(record, Reject) or record.dialogue:
                yield record
                continue
            for number, data in enumerate(raw_records.cut_at_blank_lines([record.data], part_bytes)):
                part = _make_document(f"{record.id}#{number}", data.decode(), data)
                yield part._replace(split=record.split) if isinstance(part, Document) else part


def _read_item(item: Item, unit: Unit[SourceConfig]) -> Iterator[Document | Reject]:
    config, where = unit.config, f"data.sources.{unit.source}"
    fields = ("*",) if config.chat else _needed_fields(config)
    text_field = "" if config.chat else config.text_field
    options = ReadOptions(where, text_field, config.max_record_bytes, columns=config.columns, fields=fields)
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
    if config.chat:
        document = _make_dialogue(record_id, content, config)
    elif config.text_field not in content:
        return Reject(record_id, f"{NO_FIELD} {config.text_field!r}", repr(content)[:EXCERPT])
    else:
        is_chat = bool(config.chosen_field) and isinstance(content[config.text_field], list)
        content = _write_messages(record_id, content, config) if is_chat else content
        document = _parse_text_field(record_id, content[config.text_field], config.text_field)
        if is_chat and isinstance(document, Document):
            document = document._replace(is_chat=True)
    if isinstance(document, Reject):
        return document
    if config.split_field:
        if (split := content.get(config.split_field)) not in SPLITS:
            return Reject(record_id, f"field {config.split_field!r} names no split", repr(split)[:EXCERPT])
        document = document._replace(split=split)
    if config.split:
        document = document._replace(split=config.split)
    return _add_fields(document, content, config)


def _make_dialogue(record_id: str, content: dict[str, Any], config: SourceConfig) -> Document | Reject:
    field = "" if config.text_field == SourceConfig.text_field else config.text_field
    try:
        dialogue = read_dialogue(content, config.chat, field)
    except DialogueError as error:
        return Reject(record_id, str(error), repr(content)[:EXCERPT])
    return Document(record_id, dialogue.text, dialogue.text.encode(), dialogue=dialogue)


def _other_fields(config: SourceConfig) -> tuple[str, ...]:
    """The fields of the texts of a record besides its first one."""
    fields = (config.pair_field, config.negative_field, config.chosen_field, config.rejected_field)
    return tuple(filter(None, fields))


def _label_field(config: SourceConfig) -> str:
    return config.label_field or config.score_field


def _needed_fields(config: SourceConfig) -> tuple[str, ...]:
    """The fields that every record must have besides its first text."""
    return tuple(filter(None, (_label_field(config), *_other_fields(config))))


def _write_messages(record_id: str, content: dict[str, Any], config: SourceConfig) -> dict[str, Any]:
    """The record with the messages of its prompt and answers as JSON; the text of an answer is the assistant's."""
    fields, written = (config.text_field, config.chosen_field, config.rejected_field), dict(content)
    for field in fields:
        value = content.get(field)
        messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
        if value is None:
            continue  # named by `_add_fields`
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise UserError(
                f"{record_id}: the field {field!r} is no list of messages, each with a role and a content; fix the "
                "record, or remove it"
            )
        written[field] = json.dumps(messages)
    return written


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(field), str) for field in ("role", "content"))


def _add_fields(document: Document, content: dict[str, Any], config: SourceConfig) -> Document | Reject:
    """The document with its label or score and its other texts, if the source has them."""
    for field in _needed_fields(config):
        if content.get(field) is None:
            raise UserError(f"{document.id}: the record has no {field!r}; name the column that holds it, or remove it")
    if label_field := _label_field(config):
        label = content[label_field]
        document = document._replace(label=label.decode(errors="replace") if isinstance(label, bytes) else label)
    for field in _other_fields(config):
        other = _parse_text_field(document.id, content[field], field)
        if isinstance(other, Reject):
            return other
        data = document.data + b"\n" + other.data
        document = document._replace(others=(*document.others, other.text), data=data)
    return document


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
