"""The settings that decide the content of a token store, and the check for changes."""

import dataclasses
import hashlib
import json
from pathlib import Path
import re
from typing import Any

from llmjax.binding import differences
from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.store import chat, record_texts, split, tokenizer
from llmjax.errors import UserError

_RESERVED = {"plans", "unfinished"}  # folders of a store that are not sources


def collect_settings(config: DataConfig) -> dict[str, Any]:
    """The settings that decide the content of a store. Raises UserError for invalid ones."""
    split.check_fractions(config.split, "data.split")
    if config.tokenizer.kind not in tokenizer.KINDS:
        tokenizer.read_tokenizer(config.tokenizer.kind, b"")  # raises
    if config.tokenizer.kind == "huggingface" and not config.tokenizer.path:
        raise UserError("data.tokenizer.path is empty: kind='huggingface' needs the path of a tokenizer.json")
    if not config.sources:
        raise UserError("data.sources is empty: give one, such as data.sources.main.path='/texts/**/*.txt'")
    for name in config.sources:
        if not re.fullmatch(r"[\w-]+", name) or name in _RESERVED:
            raise UserError(
                f"data.sources: {name!r} cannot name a folder of the store; use other letters, digits, _ and -"
            )
    settings: dict[str, Any] = {"kind": config.tokenizer.kind}
    if config.tokenizer.path and config.tokenizer.kind != "bytes":
        path = Path(config.tokenizer.path).expanduser()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        settings |= {"path": config.tokenizer.path, "sha256": content}
    elif config.tokenizer.kind == "sentencepiece":
        fields = dataclasses.asdict(config.tokenizer)
        settings = {field: value for field, value in fields.items() if field != "path"}
    form = record_texts.make_format(config)
    has_dialogues = any(source.chat for source in config.sources.values())
    template = {"path": config.chat_template, "sha256": chat.hash_template(config)}
    return {
        "sources": {name: _source_settings(source) for name, source in sorted(config.sources.items())},
        "tokenizer": settings,
        "split": dataclasses.asdict(config.split),
        **({"chat_template": template} if has_dialogues else {}),
        **({} if form is None else {form.name: json.loads(json.dumps(form.settings()))}),
    }


def _source_settings(config: SourceConfig) -> dict[str, Any]:
    """The path and the text field, and of the other fields those that differ from their defaults."""
    default, settings = SourceConfig(), {"path": config.path, "text_field": config.text_field}
    others = ("split_field", "split", "label_field", "pair_field", "negative_field", "chat", "columns")
    others += ("score_field", "chosen_field", "rejected_field")
    others += ("format", "max_record_bytes", "accept_truncated")
    return settings | {name: value for name in others if (value := getattr(config, name)) != getattr(default, name)}


def check_settings(stored: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Raise UserError, listing the changes, if the store was prepared with other settings than the current ones."""
    for part in ("tokenizer", "chat_template"):
        fields = current.get(part, {})
        if "sha256" in fields and fields["sha256"] is None:  # the file was removed since; the store holds its own copy
            current = current | {part: fields | {"sha256": stored.get(part, {}).get("sha256")}}
    if changes := differences(stored, current):
        listed = "; ".join(f"data.{field}: {old!r} -> {new!r}" for field, old, new in changes)
        raise UserError(
            f"the token store at {folder} was prepared with other settings ({listed}); "
            "use another --workdir or data.store, or delete that folder to prepare it again"
        )
