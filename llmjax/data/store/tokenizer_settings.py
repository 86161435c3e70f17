"""Tokenizer settings of a published checkpoint that its tokenizer file does not contain."""

import dataclasses
import json
from typing import Any

from llmjax.errors import UserError

FILE = "llmjax_tokenizer.json"  # beside a tokenizer file, in a workdir and in a token store


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Special ids and the form of prompts of an imported tokenizer.

    eos_id        id that ends documents when they are prepared
    stop_ids      ids at which generation stops, in the order in which the checkpoint lists them
    bos_id, pad_id, unk_id   None if the checkpoint names none; bos_id is also None if prompts do not begin with it
    prefix, suffix   ids that the tokenizer puts around a prompt
    added_tokens  entries as in `added_tokens` of tokenizer.json, for tokens that other files of the checkpoint add
    num_rows      ids from here on have no row in the model, so no text is encoded to them; None: no limit
    prefix_space  SentencePiece: whether text after a special token gets the dummy prefix that the start of a text gets
    space_marks   tokenizer.json: where a space mark is added, "first" (at the start of a text), "always" (also after
                  special tokens) or "never", instead of what the file says; "": as the file says
    """

    eos_id: int
    stop_ids: tuple[int, ...]
    bos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    added_tokens: tuple[dict[str, Any], ...] = ()
    num_rows: int | None = None
    prefix_space: bool = True
    space_marks: str = ""

    def to_bytes(self) -> bytes:
        """The content of FILE."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    @staticmethod
    def from_bytes(content: bytes) -> "TokenizerSettings":
        """Read what `to_bytes` wrote. Raises UserError for anything else."""
        try:
            fields = json.loads(content)
            listed = {name: tuple(fields[name]) for name in ("stop_ids", "prefix", "suffix", "added_tokens")}
            return TokenizerSettings(**{**fields, **listed})
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(f"{FILE}: not the settings of a tokenizer ({error}); import the checkpoint again") from None


def read_settings(tokenizer_file: Any) -> TokenizerSettings | None:
    """Read the settings beside a tokenizer file (a Path, or an epath.Path); None if there are none."""
    path = tokenizer_file.parent / FILE
    return TokenizerSettings.from_bytes(path.read_bytes()) if path.exists() else None


def apply_to_json(parts: dict[str, Any], settings: TokenizerSettings) -> dict[str, Any]:
    """Apply the settings to a parsed tokenizer.json: add the tokens of other files, drop ids without a row.

    Raises UserError if text could be encoded to an id without a row.
    """
    if settings.space_marks:
        parts = _add_space_marks(parts, settings.space_marks)
    limit = settings.num_rows
    added = {token["id"]: token for token in [*(parts.get("added_tokens") or []), *settings.added_tokens]}
    remaining = [token for i, token in sorted(added.items()) if limit is None or i < limit]
    if limit is None:
        return {**parts, "added_tokens": remaining}
    dropped = {token["content"] for i, token in added.items() if i >= limit}
    model = dict(parts["model"])
    vocab = model["vocab"]
    entries = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    beyond = {piece: i for piece, i in entries if i >= limit}
    if ordinary := sorted(beyond.keys() - dropped, key=lambda piece: beyond[piece]):
        raise UserError(
            f"the tokenizer encodes text to {beyond[ordinary[-1]] + 1} ids and the model has only {limit} rows "
            f"(the first id without a row is {beyond[ordinary[0]]}, {ordinary[0]!r}): they do not belong together"
        )
    if isinstance(vocab, dict):
        model["vocab"] = {piece: i for piece, i in vocab.items() if i < limit}
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if _join_merge(merge) not in beyond]
    else:
        model["vocab"] = vocab[:limit]
    return {**parts, "model": model, "added_tokens": remaining}


def _add_space_marks(parts: dict[str, Any], scheme: str) -> dict[str, Any]:
    """The same tokenizer.json with the spaces of transformers' LlamaTokenizer, which ignores those of the file."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if scheme != "never":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    return {**parts, "normalizer": None, "pre_tokenizer": metaspace, "decoder": {"type": "Sequence", "decoders": steps}}


def _join_merge(merge: Any) -> str:
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)
