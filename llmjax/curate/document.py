"""A document on its way through the stages: text, scores and metadata."""

from collections.abc import Mapping
import dataclasses
import hashlib
import re
from typing import Any

import numpy as np

_PIECE = re.compile(r"\w{1,12}|[^\w\s]")
EXCERPT = 200  # characters of a dropped document that are shown


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document between two stages.

    id, source  as the input names it, and which input that is
    text        what the stages before made of it; of kind "html" or "auto" until pages are extracted
    meta        the record's other fields, carried through to the output
    scores      what stages measured: numbers, the columns that thresholds are applied to
    notes       what stages found that is no number, kept beside the text and shown on the card
    language    its code; empty: not asked
    content     128 bits that exact copies share; empty: not asked
    signature   uint32 [minhash.SIZE]; None: not asked
    """

    id: str
    source: str
    text: str
    kind: str = "text"
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    language: str = ""
    content: bytes = b""
    signature: np.ndarray | None = None

    def with_text(self, text: str, **scores: float) -> "Document":
        """Return a copy with another text and more scores."""
        return dataclasses.replace(self, text=text, scores={**self.scores, **scores})

    def with_scores(self, scores: Mapping[str, float], **notes: Any) -> "Document":
        """Return a copy with more scores and notes."""
        return dataclasses.replace(self, scores={**self.scores, **scores}, notes={**self.notes, **notes})


def count_tokens(text: str) -> int:
    """Pieces of words of up to 12 characters, and marks: about what a tokenizer of 32,000 makes of English prose.

    The same for every tokenizer that a later run may train, and fast; exact counts come with the token store.
    """
    return len(_PIECE.findall(text))


def hash_of(*parts: str) -> int:
    """64 bits of the names of a thing: an order that depends on no place in a file and on no run."""
    joined = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def content_hash(text: str) -> bytes:
    """128 bits of a text, letter case and spacing aside: exact copies share it."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
