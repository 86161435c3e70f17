"""MinHash signatures of 5-word shingles, computed with NumPy alone: the same on every machine."""

import functools
import string

import numpy as np

from llmjax.data.hashing import GOLDEN_GAMMA, splitmix64

BANDS, ROWS = 14, 8  # texts of Jaccard similarity 0.75 share a band with probability 0.77, of 0.85 with 0.99
SIZE = BANDS * ROWS
SHINGLE_WORDS = 5
# Worked on at a time; the products, 128 KiB, fit the cache.
_BLOCK_BYTES, _BLOCK_SHINGLES, _BLOCK_PRODUCTS = 1 << 20, 1 << 14, 1 << 15

_draws = np.random.Generator(np.random.PCG64(0x6D696E68)).integers(0, 1 << 32, (2, SIZE), dtype=np.uint64)
_FACTORS, _OFFSETS = (_draws[0] | np.uint64(1)).astype(np.uint32), _draws[1].astype(np.uint32)

_INVERSE = pow(GOLDEN_GAMMA, -1, 1 << 64)

_byte = np.arange(256)
_IS_WORD = (_byte >= 0x80) | np.isin(
    _byte, np.frombuffer((string.ascii_letters + string.digits + "_").encode(), np.uint8)
)
_STARTS_CHARACTER = (_byte >= 0xE3) & (_byte <= 0xED)  # East Asian scripts have no spaces: each character is a word


def compute_signature(data: bytes) -> np.ndarray:
    """Compute the signature of a text in UTF-8: uint32 [SIZE].

    Words are runs of letters, digits and underscores; case matters.
    """
    words = hash_words(data)
    if not words.size:
        # Texts without words are similar if their first bytes are.
        words = np.frombuffer(data[:4096], np.uint8).astype(np.uint64)
    hashes = np.unique((hash_shingles(words, min(SHINGLE_WORDS, words.size)) >> np.uint64(32)).astype(np.uint32))
    smallest = np.full(SIZE, 0xFFFFFFFF, np.uint32)
    for begin in range(0, hashes.size, _BLOCK_SHINGLES):
        block = hashes[begin : begin + _BLOCK_SHINGLES]
        step = max(1, _BLOCK_PRODUCTS // block.size)
        for first in range(0, SIZE, step):
            values = block * _FACTORS[first : first + step, None]
            values += _OFFSETS[first : first + step, None]
            np.minimum(smallest[first : first + step], values.min(axis=1), out=smallest[first : first + step])
    return smallest


def hash_words(data: bytes) -> np.ndarray:
    """Hash each word of a text in UTF-8: uint64 [words]."""
    return np.concatenate([_hash_block_words(block) for block in _blocks(data)])


def hash_shingles(words: np.ndarray, size: int) -> np.ndarray:
    """Hash every run of `size` words, 1 <= size <= words: uint64 [words - size + 1]."""
    hashes = words[: words.size - size + 1].copy()
    for offset in range(1, size):
        hashes *= np.uint64(GOLDEN_GAMMA)
        hashes += words[offset : offset + hashes.size]
    return splitmix64(hashes)


def hash_band(signatures: np.ndarray, band: int) -> np.ndarray:
    """Hash a band of signatures: uint64 [documents], equal if all rows of the band are equal."""
    keys = np.zeros(len(signatures), np.uint64)
    for row in range(band * ROWS, (band + 1) * ROWS):
        keys = splitmix64(keys * np.uint64(GOLDEN_GAMMA) + signatures[:, row])
    return keys


def _blocks(data: bytes) -> list[bytes]:
    """Split the text into blocks, at spaces if there are any, so that no word changes."""
    blocks, begin = [], 0
    while len(data) - begin > _BLOCK_BYTES:
        end = data.rfind(b" ", begin + 1, begin + _BLOCK_BYTES)
        end = end if end > 0 else begin + _BLOCK_BYTES
        blocks.append(data[begin:end])
        begin = end
    return [*blocks, data[begin:]]


def _hash_block_words(block: bytes) -> np.ndarray:
    """uint64 [words]. A word's hash depends on its bytes alone, not on its position: a difference of prefix sums."""
    values = np.frombuffer(block, np.uint8)
    inside = np.zeros(values.size + 2, bool)
    inside[1:-1] = _IS_WORD[values]
    begins = inside[1:-1] & (~inside[:-2] | _STARTS_CHARACTER[values])
    begin = np.flatnonzero(begins)
    if not begin.size:
        return np.zeros(0, np.uint64)
    ends = np.flatnonzero(inside[1:-1] & ~inside[2:]) + 1
    end = ends[np.searchsorted(ends, begin, "right")]
    end[:-1] = np.minimum(end[:-1], begin[1:])
    powers, inverses = _powers(1 << max(16, (values.size - 1).bit_length()))
    sums = np.zeros(values.size + 1, np.uint64)
    np.cumsum((values.astype(np.uint64) + np.uint64(1)) * powers[: values.size], out=sums[1:])
    return splitmix64((sums[end] - sums[begin]) * inverses[begin])


@functools.cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` powers of GOLDEN_GAMMA and of its inverse, modulo 2**64."""
    factors = np.repeat(np.array([[GOLDEN_GAMMA], [_INVERSE]], np.uint64), count, axis=1)
    factors[:, 0] = 1
    powers, inverses = np.cumprod(factors, axis=1, dtype=np.uint64)
    return powers, inverses
