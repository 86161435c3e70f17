"""Signatures are what their definition says, whatever the length of the text and the way it is worked through."""

import random
import re

import numpy as np
import pytest

from llmjax.data.store import minhash


def by_definition(text: str) -> list[int]:
    """Word by word, in Python's integers."""
    limit = (1 << 64) - 1

    def splitmix64(value: int) -> int:
        value ^= value >> 30
        value = value * 0xBF58476D1CE4E5B9 & limit
        value ^= value >> 27
        value = value * 0x94D049BB133111EB & limit
        return value ^ value >> 31

    words = []
    for word in re.findall(r"[a-zA-Z0-9_]+", text):
        words.append(
            splitmix64(
                sum((byte + 1) * pow(minhash.GOLDEN_GAMMA, power, 1 << 64) for power, byte in enumerate(word.encode()))
                & limit
            )
        )
    size = min(minhash.SHINGLE_WORDS, len(words))
    hashes = []
    for begin in range(len(words) - size + 1):
        value = 0
        for word in words[begin : begin + size]:
            value = (value * minhash.GOLDEN_GAMMA + word) & limit
        hashes.append(splitmix64(value) >> 32)
    pairs = zip(minhash._FACTORS.tolist(), minhash._OFFSETS.tolist(), strict=True)
    return [min((value * factor + offset) & 0xFFFFFFFF for value in hashes) for factor, offset in pairs]


@pytest.mark.parametrize("words", [1, 4, 5, 6, 60, 300, 700, 3000])
def test_signatures_are_as_defined(words):
    draw = random.Random(words)
    text = ", ".join(f"word{draw.randrange(1000)}" for _ in range(words))
    assert minhash.compute_signature(text.encode()).tolist() == by_definition(text)


@pytest.mark.parametrize(("shingles", "products"), [(1, 1), (7, 64), (1 << 14, 1 << 20)])
def test_word_hashes_do_not_depend_on_blocks(shingles, products, monkeypatch):
    text = " ".join(f"word{number % 37}" for number in range(100)).encode()
    expected = minhash.compute_signature(text)
    monkeypatch.setattr(minhash, "_BLOCK_SHINGLES", shingles)
    monkeypatch.setattr(minhash, "_BLOCK_PRODUCTS", products)
    assert np.array_equal(minhash.compute_signature(text), expected)


def test_values_never_change_between_versions():
    """Splits of stores that exist rest on them."""
    values = minhash.compute_signature(b"The quick brown fox jumps over the lazy dog, and runs away.")
    assert values[:4].tolist() == [623612810, 112450900, 578524495, 757125988]
