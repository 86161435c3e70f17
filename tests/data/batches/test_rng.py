"""Draws are uniform and keyed, sums of parts all alike."""

import math

import numpy as np

from llmjax.data.batches.rng import CounterRng, bernoulli, randint
from llmjax.data.objectives.row_chunks import RowChunks, draw_partition
from tests.data.objectives.masks import assert_share


class TestDraws:
    """The counter-based generator."""

    def test_uniform_and_keyed(self):
        positions = np.arange(100_000)
        bits = CounterRng("a", 1).bits(np.array([[5], [6]]), 0, positions)
        assert bits.shape == (2, 100_000) and len(np.unique(bits)) == bits.size
        for share in (0.01, 0.5, 0.97):
            assert_share(bernoulli(bits, share).ravel(), share)
        assert bernoulli(bits, 1.0).all()
        counts = np.bincount(randint(bits, 7).ravel(), minlength=8)
        assert counts[7] == 0 and abs(counts[:7] - bits.size / 7).max() < 5 * math.sqrt(bits.size / 7)
        for other in (
            CounterRng("a", 2).bits(np.array([5]), 0, positions),
            CounterRng("a", 1).bits(np.array([5]), 1, positions),
            bits[1],
        ):
            assert abs(np.corrcoef(bits[0].astype(float), other.astype(float))[0, 1]) < 0.02

    def test_partitions_are_equally_likely(self):
        """All ways to write 6 as a sum of 3 parts come equally often."""
        count = 20_000
        number = np.arange(count)
        chunks = RowChunks(targets=number, inputs=number, length=number, row=number, sample=number, column=number * 0)
        parts = draw_partition(np.full(count, 6), np.full(count, 3), chunks, CounterRng(0), 0).reshape(-1, 3)
        assert (parts.sum(axis=1) == 6).all() and (parts >= 1).all()
        _, counts = np.unique(parts, axis=0, return_counts=True)
        assert len(counts) == math.comb(5, 2) and abs(counts - count / 10).max() < 5 * math.sqrt(count / 10)
