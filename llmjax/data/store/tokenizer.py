"""Read tokenizers from their files."""

import json
from pathlib import Path
from typing import Any

from llmjax.data.store.tokenizer_kinds import Bytes, HuggingFace, SentencePiece, Tokenizer
from llmjax.data.store.tokenizer_settings import TokenizerSettings, read_settings
from llmjax.errors import UserError, suggest

FILE_NAMES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "bytes": "tokenizer.bytes"}
KINDS = tuple(FILE_NAMES)


def read_tokenizer(
    kind: str, model: bytes, *, lossless: bool = True, settings: TokenizerSettings | None = None
) -> Tokenizer:
    """Read a tokenizer from the content of its file, with the settings of an import if it has any.

    Raises UserError for an unknown kind or a file that is no tokenizer.
    """
    if kind == "bytes":
        return Bytes()
    classes = {"sentencepiece": SentencePiece, "huggingface": HuggingFace}
    if kind not in classes:
        raise UserError(f"data.tokenizer.kind={kind!r}{suggest(kind, KINDS)}: expected one of {', '.join(KINDS)}")
    try:
        return classes[kind](model, lossless=lossless, settings=settings)
    except UserError:
        raise
    except Exception as error:  # the libraries raise RuntimeError, OSError and bare Exception for a damaged file
        raise UserError(
            f"data.tokenizer.path: not a {kind} model ({error}); give one, or set data.tokenizer.kind to its kind"
        ) from None


def read_tokenizer_file(kind: str, path: Any, *, lossless: bool = True) -> Tokenizer:
    """Read a tokenizer from its file (a Path or an epath.Path) and the settings beside it."""
    if kind == "bytes":
        return Bytes()
    return read_tokenizer(kind, path.read_bytes(), lossless=lossless, settings=read_settings(path))


def load_tokenizer(store: Path | str) -> Tokenizer:
    """Load the tokenizer that a store was prepared with, from the store's own copy.

    Raises UserError if there is no finished store, or if the copy is not the one that the manifest names.
    """
    store = Path(store)
    try:
        record: dict[str, Any] = json.loads((store / "manifest.json").read_text())["tokenizer"]
        tokenizer = read_tokenizer_file(record["kind"], store / FILE_NAMES[record["kind"]], lossless=record["lossless"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no complete token store at {store} ({error}); run `llmjax prepare`") from None
    if tokenizer.sha256 != record["sha256"]:
        raise UserError(
            f"{store}: the tokenizer's file is not the one that the store was prepared with "
            f"(sha256 {tokenizer.sha256[:12]}, expected {record['sha256'][:12]}); restore it, or prepare again"
        )
    return tokenizer
