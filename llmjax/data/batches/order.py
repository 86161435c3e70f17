"""The training order: a keyed permutation of 0..size-1, evaluated only where needed.

It needs no shuffle file, no pass over the data, and has no limit of 2**32 items: a Feistel network over Z_a x Z_b with
a * b just above the size, and cycle walking for the few values outside (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002).
"""

from collections.abc import Callable
import hashlib
import math

import numpy as np

from llmjax.data.hashing import hash64
from llmjax.errors import UserError

_NUM_ROUNDS = 6


class Permutation:
    """An order of `size` items (1 to 2**62), a pure function of `key`, such as (seed, name, epoch)."""

    def __init__(self, size: int, *key: int | str):
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"size={size}: a permutation has 1 to 2**62 items")
        self.size = size
        a = math.isqrt(size - 1) + 1  # the least a with a * a >= size
        self._moduli = (np.uint64(a), np.uint64(-(-size // a)))
        digest = hashlib.blake2b(repr((size, *key)).encode(), digest_size=8 * _NUM_ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """The item at each index: int64, the shape of `index`."""
        return self._cycle_walk(index, self._encrypt)

    def inverse(self, item: np.ndarray) -> np.ndarray:
        """The index of each item: int64, the shape of `item`."""
        return self._cycle_walk(item, self._decrypt)

    def _cycle_walk(self, values: np.ndarray, network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Apply the network to each value until the result is below `size`."""
        values = np.asarray(values)
        if values.size and (values.min() < 0 or values.max() >= self.size):
            raise IndexError(f"an index is outside 0..{self.size - 1}")
        flat = network(values.astype(np.uint64).ravel())
        while (outside := np.flatnonzero(flat >= self.size)).size:
            flat[outside] = network(flat[outside])
        return flat.astype(np.int64).reshape(values.shape)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        a, b = self._moduli
        high, low = np.divmod(x, a)
        for number, key in enumerate(self._keys):
            if number % 2:
                high = (high + hash64(low, key) % b) % b
            else:
                low = (low + hash64(high, key) % a) % a
        return high * a + low

    def _decrypt(self, x: np.ndarray) -> np.ndarray:
        a, b = self._moduli
        high, low = np.divmod(x, a)
        for number, key in reversed(list(enumerate(self._keys))):
            if number % 2:
                high = (high + b - hash64(low, key) % b) % b
            else:
                low = (low + a - hash64(high, key) % a) % a
        return high * a + low


class Skips:
    """Spans of sample indices to skip: ((from, to), ...), `to` excluded."""

    def __init__(self, spans: tuple):
        merged: list[list[int]] = []
        for span in sorted(_valid_span(span) for span in spans):
            if merged and span[0] <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], span[1])
            else:
                merged.append(list(span))
        self._starts, self._ends = np.array(merged, np.int64).reshape(-1, 2).T
        self._removed = np.concatenate([[0], np.cumsum(self._ends - self._starts)])
        self._unskipped_starts = self._starts - self._removed[:-1]

    def count_unskipped(self, sample: int) -> int:
        """The number of samples below this index that are not skipped."""
        spans = int(np.searchsorted(self._starts, sample, "right"))  # that start at or before the sample
        beyond = max(0, int(self._ends[spans - 1]) - sample) if spans else 0
        return sample - int(self._removed[spans]) + beyond

    def sample(self, number: np.ndarray) -> np.ndarray:
        """The index of sample `number` (from 0) among those that are not skipped."""
        return number + self._removed[np.searchsorted(self._unskipped_starts, number, "right")]


def _valid_span(span: tuple) -> tuple[int, int]:
    if not (isinstance(span, tuple) and len(span) == 2 and all(isinstance(edge, int) for edge in span)):
        raise UserError(f"data.skip entry {span!r}: expected (from_sample, to_sample)")
    if not 0 <= span[0] < span[1]:
        raise UserError(f"data.skip entry {span!r}: from must be 0 or more and below to")
    return span
