"""A document between two stages: text, scores and metadata."""

from collections.abc import Mapping
import dataclasses
import hashlib
import re
from typing import Any

import numpy as np

_TOKEN = re.compile(r"\w{1,12}|[^\w\s]")
EXCERPT = 200  # characters of a dropped document on the card
NOT_STATED = "not stated"  # licence or origin in report.json


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document between two stages.

        id, source    its id in the input, and the input's name
        text          after the previous stages
        kind          "text"; before extraction also "html", or "auto" if the input does not say which
        meta          other fields of the record, copied to the output
        scores        measured numbers, to which thresholds are applied
        notes         other findings, shown on the card
    NOT_STATED = "not stated"  # licence or origin in report.json
        language      code; empty: not measured
        content_hash  128 bits, equal for exact copies; empty: not measured
        signature     uint32 [minhash.SIZE]; None: not measured
    """

    id: str
    source: str
    text: str
    kind: str = "text"
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    language: str = ""
    content_hash: bytes = b""
    signature: np.ndarray | None = None

    def with_text(self, text: str, **scores: float) -> "Document":
        """Return a copy with another text and more scores."""
        return dataclasses.replace(self, text=text, scores={**self.scores, **scores})

    def with_scores(self, scores: Mapping[str, float], **notes: Any) -> "Document":
        """Return a copy with more scores and notes."""
        return dataclasses.replace(self, scores={**self.scores, **scores}, notes={**self.notes, **notes})


def count_tokens(text: str) -> int:
    """Word pieces of up to 12 characters, and punctuation marks: about the tokens of a vocabulary of 32,000 in English.

    Exact counts need a tokenizer, which is trained later.
    """
    return len(_TOKEN.findall(text))


def stable_hash(*parts: str) -> int:
    """A 64-bit hash, the same in every process."""
    joined = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def hash_content(text: str) -> bytes:
    """A 128-bit hash of a text that ignores letter case and spacing: equal for exact copies."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
