"""Packed batches made by hand, for tests that need no store."""

import dataclasses

import numpy as np

from llmjax.batch import Batch


def packed(rows: int, seq: int, vocab: int, *, first_sample: int = 0, seed: int = 0) -> Batch:
    """Rows of two to four documents each and a little padding at the end, keyed by their sample index."""
    out = {name: np.zeros((rows, seq), np.int32) for name in ("inputs", "targets", "segments", "positions")}
    samples = np.arange(first_sample, first_sample + rows, dtype=np.uint64)
    for row, sample in enumerate(samples):
        rng = np.random.default_rng((seed, int(sample)))
        edges = np.sort(rng.choice(np.arange(2, seq - 2), size=rng.integers(2, 5), replace=False))
        for number, (start, stop) in enumerate(zip(np.r_[0, edges[:-1]], edges, strict=True), 1):
            tokens = rng.integers(1, vocab, stop - start)
            out["inputs"][row, start:stop] = np.r_[0, tokens[:-1]]
            out["targets"][row, start:stop] = tokens
            out["segments"][row, start:stop] = number
            out["positions"][row, start:stop] = np.arange(stop - start)
    words = np.stack([samples >> np.uint64(32), samples & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)
    return Batch(**out, weights=(out["segments"] > 0).astype(np.float32), sample=words)


def suiting(config, rows: int, seq: int, vocab: int, *, first_sample: int = 0, seed: int = 0) -> Batch:
    """A packed batch of the kind that a family reads: with hidden tokens where it learns "masked", with sources for an
    encoder-decoder, whose documents have as many tokens there, in another order."""
    batch = packed(rows, seq, vocab, first_sample=first_sample, seed=seed)
    if "masked" in config.objectives:
        rng = np.random.default_rng((seed, first_sample, 1))
        hidden = (rng.random(batch.targets.shape) < 0.3) & (batch.segments > 0)
        inputs = np.where(hidden, 0, batch.targets).astype(np.int32)
        return dataclasses.replace(batch, inputs=inputs, weights=hidden.astype(np.float32))
    if config.family == "encdec":
        source = np.where(batch.segments > 0, (batch.targets * 7 + 3) % vocab, 0).astype(np.int32)
        return dataclasses.replace(
            batch, source=source, source_segments=batch.segments, source_positions=batch.positions
        )
    return batch
