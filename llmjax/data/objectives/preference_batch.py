"""Batches of preferences: a row is one record, and its segments are the prompt with either answer."""

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.objectives.row_chunks import pad_rows, split_u64, unpack_rows


def make_row_budget(seq_len: int) -> RowBudget:
    """The stored tokens of a record, which are fewer than its positions, since the prompt is read twice."""
    return RowBudget(seq_len=seq_len, name="preferences")


def build_preference_batch(rows: Rows, samples: np.ndarray, seq_len: int, *, reads_reference: bool = True) -> Batch:
    """Both sequences of each record, of which the tokens of the answers are targets.

    rows             of one record each, whose labels are the numbers of tokens of prompt, chosen and rejected answer
    reads_reference  whether the batch has log-likelihoods of the reference model; 0 where the rows have none yet
    """
    chunks = unpack_rows(rows, samples)
    counts = np.zeros((len(chunks.row), 3), np.int64)
    if rows.labels is not None:
        counts = rows.labels[chunks.row, chunks.column].astype(np.int64)
    prompt, answers = counts[:, :1], counts[:, 1:]
    length = (prompt + answers).reshape(-1)
    # Of each record the spans (prompt, chosen) and (prompt, rejected).
    starts = chunks.start[:, None] + np.cumsum(counts, axis=1) - counts
    span = [0, 1, 0, 2]
    inputs = chunks.targets[ranges(starts[:, span].reshape(-1), counts[:, span].reshape(-1))]
    end = np.cumsum(length)
    targets = np.roll(inputs, -1)
    targets[end - 1] = 0
    weights = np.zeros(len(inputs), np.float32)
    weights[ranges(end - 1 - answers.reshape(-1), answers.reshape(-1))] = 1.0
    row = np.repeat(chunks.row, 2)
    segments, positions, inputs, targets, weights = pad_rows(
        row, length, len(rows.targets), seq_len, inputs, targets, weights
    )
    reference = np.zeros((len(rows.targets), 2), np.float32) if rows.reference is None else rows.reference
    return Batch(
        inputs=inputs,
        targets=targets,
        weights=weights,
        segments=segments,
        positions=positions,
        sample=split_u64(samples),
        num_texts=2,
        reference=reference if reads_reference else None,
    )
