"""Batches of records of several texts: a row is one record, and each of its texts is a segment of the row."""

import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.objectives.row_chunks import pad_rows, split_u64, unpack_rows, write_frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextsTask:
    """How the texts of a record are read.

    num_texts    texts of a record
    has_score    whether a record has the similarity of its texts, after the numbers of tokens in its label
    before, after   ids around each text, from `labels.find_frame`
    """

    num_texts: int
    has_score: bool = False
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def frame(self) -> int:
        """Positions that each text needs beside its tokens."""
        return len(self.before) + len(self.after)


def make_row_budget(task: TextsTask, name: str, seq_len: int) -> RowBudget:
    """The positions that records need, by their stored tokens, of which the EOS is not read."""
    added = max(task.num_texts * task.frame - 1, 0)
    costs = np.arange(seq_len - added + 1) + added
    return RowBudget(seq_len=seq_len, costs=costs, name=f"{name} {task.num_texts} x {task.frame}")


def build_texts_batch(rows: Rows, samples: np.ndarray, task: TextsTask, seq_len: int) -> Batch:
    """Records with one segment for each text, in its frame. A record is scored once, at its first position.

    rows   of one record each, whose labels are the numbers of tokens of its texts, and its score; without labels there
           are no texts
    """
    chunks = unpack_rows(rows, samples)
    counts = np.zeros((len(chunks.row), task.num_texts), np.int64)
    if rows.labels is not None:
        counts = rows.labels[chunks.row, chunks.column, : task.num_texts].astype(np.int64)
    length = counts.reshape(-1) + task.frame
    inputs, start = write_frames(length, task.before, task.after)
    inputs[ranges(start + len(task.before), counts.reshape(-1))] = chunks.targets[ranges(chunks.start, counts.sum(1))]
    row = np.repeat(chunks.row, task.num_texts)
    segments, positions, inputs = pad_rows(row, length, len(rows.targets), seq_len, inputs)
    weights = np.zeros(inputs.shape, np.float32)
    weights[chunks.row, 0] = 1.0
    labels = np.zeros((*inputs.shape, 1), np.float32)
    if task.has_score and rows.labels is not None:
        labels[chunks.row, 0, 0] = rows.labels[chunks.row, chunks.column, task.num_texts]
    return Batch(
        inputs=inputs,
        targets=np.zeros_like(inputs),
        weights=weights,
        segments=segments,
        positions=positions,
        sample=split_u64(samples),
        labels=labels if task.has_score else None,
        num_texts=task.num_texts,
    )
