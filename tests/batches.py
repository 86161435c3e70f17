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


def packed_for(config, rows: int, seq: int, vocab: int, *, first_sample: int = 0, seed: int = 0) -> Batch:
    """A packed batch of the kind that a family reads: with masked tokens where it supports "masked" (and token types if
    it has them), with sources for an encoder-decoder."""
    if config.reads_source:
        return packed_pairs(rows, seq, seq + 8, vocab, first_sample=first_sample)
    batch = packed(rows, seq, vocab, first_sample=first_sample, seed=seed)
    if "masked" not in config.objectives:
        return batch
    rng = np.random.default_rng((seed, first_sample, 1))
    is_masked = (rng.random(batch.targets.shape) < 0.3) & (batch.segments > 0)
    return dataclasses.replace(
        batch,
        inputs=np.where(is_masked, vocab - 1, batch.targets).astype(np.int32),
        weights=is_masked.astype(np.float32),
        token_types=rng.integers(0, config.token_types, batch.inputs.shape).astype(np.int32)
        if config.token_types
        else None,
    )


def packed_pairs(rows: int, seq: int, source_seq: int, vocab: int, *, first_sample: int = 0) -> Batch:
    """Packed targets, each document with a source of a length of its own, and padding on both sides."""
    batch = packed(rows, seq, vocab, first_sample=first_sample)
    names = ("source", "source_segments", "source_positions")
    sources = {name: np.zeros((rows, source_seq), np.int32) for name in names}
    for row in range(rows):
        rng = np.random.default_rng((7, first_sample + row))
        count = batch.segments[row].max()
        edges = np.sort(rng.choice(np.arange(1, source_seq - 2), size=count, replace=False))
        for number, (start, stop) in enumerate(zip(np.r_[0, edges[:-1]], edges, strict=True), 1):
            sources["source"][row, start:stop] = rng.integers(1, vocab, stop - start)
            sources["source_segments"][row, start:stop] = number
            sources["source_positions"][row, start:stop] = np.arange(stop - start)
    return dataclasses.replace(batch, **sources)


def progressions(step: int, rows: int, seq: int, vocab: int) -> Batch:
    """Unpacked rows of tokens start + i * difference modulo the vocabulary."""
    rng = np.random.default_rng(step)
    start, difference = rng.integers(0, vocab, (rows, 1)), rng.integers(1, 6, (rows, 1))
    tokens = ((start + difference * np.arange(seq + 1)) % vocab).astype(np.int32)
    ones = np.ones((rows, seq), np.int32)
    positions = np.tile(np.arange(seq, dtype=np.int32), (rows, 1))
    changes = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=ones.astype(np.float32))
    return dataclasses.replace(packed(rows, seq, vocab), **changes, segments=ones, positions=positions)
