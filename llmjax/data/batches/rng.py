"""Counter-based random numbers on the host: each draw is a pure function of (key, sample, purpose, position)."""

import hashlib

import numpy as np

from llmjax.data.hashing import hash64


class CounterRng:
    """A generator without state: SplitMix64 (Steele, Lea and Flood, 2014) keyed by (key, sample).

    key  the seed, and what else distinguishes this stream of samples from others
    """

    def __init__(self, *key: int | str):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self._key = np.frombuffer(digest, "<u8").astype(np.uint64)[0]

    def bits(self, samples: np.ndarray, purpose: int, positions: np.ndarray) -> np.ndarray:
        """64 random bits for each (sample, position), broadcast against each other: uint64. `purpose`: 0 to 2**20."""
        start = hash64(np.asarray(samples).astype(np.uint64), self._key)
        return hash64(np.asarray(positions).astype(np.uint64) + np.uint64(purpose << 40), start)


def bernoulli(bits: np.ndarray, probability: float) -> np.ndarray:
    """True with this probability, from random bits: bool."""
    return bits >> np.uint64(11) < np.uint64(round(probability * (1 << 53)))


def randint(bits: np.ndarray, sizes: np.ndarray | int) -> np.ndarray:
    """An integer in [0, size) for each size (1 to 2**31), from random bits: int64.

    The probability of each is within 2**-32 of 1 / size.
    """
    return ((bits >> np.uint64(32)) * np.asarray(sizes).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
