"""Special ids that objectives use: the tokenizer's own, or new ids after its vocabulary."""

from collections.abc import Sequence
import dataclasses
import unicodedata

import numpy as np

from llmjax.data.store.tokenizer import Tokenizer

# Each group lists the names that tokenizers use; the first is appended if a tokenizer has none of them.
MASK = (("[MASK]",), ("<mask>",), ("<|mask|>",))
FIM = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"),
)
MODES = (("[R]", "[S]", "[X]"), ("[NLU]", "[S2S]", "[NLG]"))


def list_sentinels(count: int) -> tuple[tuple[str, ...], ...]:
    """The names of the sentinels of spans 0 to count - 1."""
    return (tuple(f"<extra_id_{number}>" for number in range(count)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids that an objective uses.

    bos_id     the id that is read first: BOS, or EOS if the tokenizer has no BOS, or the start id of a decoder
    eos_id     the id that ends documents
    text_size  number of ids of the tokenizer, special ones included
    size       number of all ids, appended ones included: the smallest vocabulary of a model
    names      names of the special ids
    ids        the special ids that the objective requested, in the order of its request
    """

    bos_id: int
    eos_id: int
    text_size: int
    size: int
    names: dict[int, str]
    ids: tuple[int, ...] = ()


def build_vocab(tokenizer: Tokenizer, *groups: tuple[Sequence[str], ...]) -> Vocabulary:
    """The tokenizer's ids, and for each group the ids of the first names that the tokenizer has, else new ids."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    size, ids = tokenizer.vocab_size, []
    for group in groups:
        existing = [members for members in group if all(name in tokenizer.special_tokens for name in members)]
        for name in (existing or group)[0]:
            if (token_id := tokenizer.special_tokens.get(name)) is None:
                token_id, size = size, size + 1
                names[token_id] = name
            ids.append(token_id)
    return Vocabulary(
        bos_id=tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        text_size=tokenizer.vocab_size,
        size=size,
        names=names,
        ids=tuple(ids),
    )


def find_word_edges(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(continues a word, can be continued) of every id: bool [vocab] each.

    Two neighbours belong to one word if the second continues a word and the first can be continued: there are letters,
    digits or underscores on both sides of the edge, or WordPiece's own prefix.
    """
    continues_word, can_be_continued = np.zeros(tokenizer.vocab_size, bool), np.zeros(tokenizer.vocab_size, bool)
    special = set(tokenizer.special_tokens.values())
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.piece(token_id).decode(errors="replace")
        if token_id in special or not text:
            continue
        continues_word[token_id] = text.startswith(tokenizer.joiner) if tokenizer.joiner else _is_in_word(text[0])
        can_be_continued[token_id] = bool(tokenizer.joiner) or _is_in_word(text[-1])
    return continues_word, can_be_continued


def _is_in_word(character: str) -> bool:
    """Whether a character is part of a longer word. In scripts without spaces each character is a word, as in BERT."""
    code = ord(character)
    is_word = 0x3040 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000
    return not is_word and (character.isalnum() or character in "_\ufffd" or unicodedata.combining(character) > 0)
