"""The settings that decide the content of a token store, and the check for changes."""

import dataclasses
import hashlib
from pathlib import Path
import re
from typing import Any

from llmjax.binding import differences
from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.store import split, tokenizer
from llmjax.errors import UserError

_TAKEN = {"plans", "unfinished"}  # folders that a store has besides its sources


def settings_of(config: DataConfig) -> dict[str, Any]:
    """What decides the content of a store. Raises UserError for settings that cannot be honoured."""
    split.check(config.split, "data.split")
    given = config.tokenizer
    if given.kind not in tokenizer.KINDS:
        tokenizer.read_tokenizer(given.kind, b"")  # raises
    if given.kind == "huggingface" and not given.path:
        raise UserError("data.tokenizer.path is empty: kind='huggingface' needs the path of a tokenizer.json")
    for name in config.sources:
        if not re.fullmatch(r"[\w-]+", name) or name in _TAKEN:
            raise UserError(
                f"data.sources: {name!r} cannot name a folder of the store; use other letters, digits, _ and -"
            )
    if not config.sources:
        raise UserError("data.sources is empty: give one, such as data.sources.main.path='/texts/**/*.txt'")
    chosen: dict[str, Any] = {"kind": given.kind}
    if given.path and given.kind != "bytes":
        path = Path(given.path).expanduser()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        chosen |= {"path": given.path, "sha256": content}
    elif given.kind == "sentencepiece":
        chosen = {field: value for field, value in dataclasses.asdict(given).items() if field != "path"}
    return {
        "sources": {name: _source(source) for name, source in sorted(config.sources.items())},
        "tokenizer": chosen,
        "split": dataclasses.asdict(config.split),
    }


def _source(config: SourceConfig) -> dict[str, Any]:
    default, told = SourceConfig(), {"path": config.path, "text_field": config.text_field}
    others = ("split_field", "format", "max_record_bytes", "accept_truncated")
    return told | {name: value for name in others if (value := getattr(config, name)) != getattr(default, name)}


def check_settings(made: dict, asked: dict, folder: Path) -> None:
    if "sha256" in asked["tokenizer"] and asked["tokenizer"]["sha256"] is None:
        # The given model file is gone since; the store holds its own copy.
        asked = asked | {"tokenizer": asked["tokenizer"] | {"sha256": made["tokenizer"].get("sha256")}}
    if changed := differences(made, asked):
        listed = "; ".join(f"data.{field}: {old!r} -> {new!r}" for field, old, new in changed)
        raise UserError(
            f"the token store at {folder} was made with other settings ({listed}); "
            "use another --workdir or data.store, or delete that folder to prepare it again"
        )
