"""Text to token ids and back: SentencePiece, Hugging Face tokenizer.json, or bytes, behind one protocol."""

from collections.abc import Iterable
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmjax.data.store.tokenizer_kinds import Bytes, HuggingFace, PromptFrame, SentencePiece
from llmjax.data.store.tokenizer_settings import TokenizerSettings, read_settings
from llmjax.errors import UserError, suggest

FILE_NAMES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "bytes": "tokenizer.bytes"}
KINDS = tuple(FILE_NAMES)


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer.

    kind, sha256     its family, and the hash of its file (and of its settings, if it has any)
    vocab_size       number of ids
    special_tokens   name -> id; text of documents never becomes one of them
    bos_id, pad_id, unk_id   None if it has no such token; every tokenizer has an EOS
    stop_ids         ids at which generation stops, `eos_id` among them unless the checkpoint says otherwise
    prompt_frame     (ids before, ids after) that an imported tokenizer puts around a prompt; None: it was not imported
    lossless         decode(encode(text)) == text for every text that was prepared with it
    joiner           prefix of a piece that continues a word ("##" of WordPiece); "": there is none
    """

    kind: str
    sha256: str
    vocab_size: int
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    unk_id: int | None
    stop_ids: tuple[int, ...]
    prompt_frame: PromptFrame | None
    lossless: bool
    joiner: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without BOS and EOS."""
        ...

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids of a text in which special tokens are recognised, int32, without `prompt_frame`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that form no character become U+FFFD."""
        ...

    def piece(self, token_id: int) -> bytes:
        """The text of one id, in UTF-8 if it is whole characters; the name of a special token."""
        ...

    def check_special(self, text: str) -> None:
        """Raise UserError for text that looks like a special token and is none of this tokenizer's."""
        ...


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
