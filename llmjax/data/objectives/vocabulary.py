"""Special ids that objectives need: the tokenizer's own, or new ids after its vocabulary."""

from collections.abc import Sequence
import dataclasses
import unicodedata

import numpy as np

from llmjax.data.store.tokenizer import Tokenizer

# Each entry lists spellings of one thing; the first is what is appended where a tokenizer has none of them.
MASK = (("[MASK]",), ("<mask>",), ("<|mask|>",))
FIM = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"),
)
MODES = (("[R]", "[S]", "[X]"), ("[NLU]", "[S2S]", "[NLG]"))


def sentinels(count: int) -> tuple[tuple[str, ...], ...]:
    """The marks of spans 0 to count - 1."""
    return (tuple(f"<extra_id_{number}>" for number in range(count)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What an objective knows of ids.

    bos_id     the id that is read first: BOS, or EOS where the tokenizer has none, or what a decoder was given
    eos_id       the id that ends documents
    text_size ids of the tokenizer, special ones included
    size      all ids, those appended included: the least vocabulary that a model of this objective has
    names     name of every id that stands for no text
    ids       those that the objective asked for, in the order in which it did
    """

    bos_id: int
    eos_id: int
    text_size: int
    size: int
    names: dict[int, str]
    ids: tuple[int, ...] = ()


def build_vocab(tokenizer: Tokenizer, *wanted: tuple[Sequence[str], ...]) -> Vocabulary:
    """The tokenizer's ids and what is wanted: for each group the first spelling that it has, else new ids."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    size, ids = tokenizer.vocab_size, []
    for spellings in wanted:
        known = [s for s in spellings if all(name in tokenizer.special_tokens for name in s)]
        for name in (known or spellings)[0]:
            if (found := tokenizer.special_tokens.get(name)) is None:
                found, size = size, size + 1
                names[found] = name
            ids.append(found)
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return Vocabulary(
        bos_id=begin, eos_id=tokenizer.eos_id, text_size=tokenizer.vocab_size, size=size, names=names, ids=tuple(ids)
    )


def word_edges(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(goes on, is gone on with) of every id: bool each. Two neighbours are of one word where the second goes on and
    the first is gone on with: letters, digits and underscores on both sides of the edge, or WordPiece's own mark."""
    continues_word, can_be_continued = np.zeros(tokenizer.vocab_size, bool), np.zeros(tokenizer.vocab_size, bool)
    special = set(tokenizer.special_tokens.values())
    for number in range(tokenizer.vocab_size):
        text = tokenizer.piece(number).decode(errors="replace")
        if number in special or not text:
            continue
        continues_word[number] = text.startswith(tokenizer.joiner) if tokenizer.joiner else _joins(text[0])
        can_be_continued[number] = bool(tokenizer.joiner) or _joins(text[-1])
    return continues_word, can_be_continued


def _joins(character: str) -> bool:
    """Whether a character is part of words. Scripts without spaces have words of one character here, as BERT has."""
    code = ord(character)
    alone = 0x3040 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000
    return not alone and (character.isalnum() or character in "_\ufffd" or unicodedata.combining(character) > 0)
