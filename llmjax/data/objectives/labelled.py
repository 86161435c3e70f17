"""Objectives on labelled documents: the class, the classes, or the number of each, at one position of it."""

import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.objectives.row_chunks import pad_rows, split_u64, unpack_rows, write_frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelTask:
    """What is predicted of a document, and where.

    num_outputs  outputs of the model's head: the classes, or 1 for a number
    multi_label  each class is decided by itself
    is_number    the label is a number
    first        predict at the document's first position, as encoders do; else at its last, which a causal model reads
                 with all the text before it
    before, after   ids around a document, from `labels.find_frame`
    eos_id       the id between the two texts of a pair, and at the end of a stored document
    """

    num_outputs: int
    multi_label: bool
    is_number: bool
    first: bool
    before: tuple[int, ...]
    after: tuple[int, ...]
    eos_id: int

    @property
    def added(self) -> int:
        """Positions that a document needs beyond its stored tokens, of which the EOS is not read."""
        return len(self.before) + len(self.after) - 1

    @property
    def label_width(self) -> int:
        """Numbers of a stored label."""
        return self.num_outputs if self.multi_label else 1


def make_row_budget(task: LabelTask, name: str, seq_len: int) -> RowBudget:
    """The positions that documents need, by their stored tokens."""
    costs = np.maximum(np.arange(seq_len - task.added + 1) + task.added, 1)
    return RowBudget(seq_len=seq_len, costs=costs, name=f"{name} {len(task.before)}+{len(task.after)}")


def build_labelled_batch(rows: Rows, samples: np.ndarray, task: LabelTask, seq_len: int) -> Batch:
    """Documents in their frame, each scored at one position: a class there is the target, other labels are `labels`.

    Without labels in the rows, those of the batch are 0. The second text of a pair, after the first EOS, has token
    type 1, as in BERT (Devlin et al., 2018, arXiv 1810.04805).
    """
    chunks = unpack_rows(rows, samples)
    length = chunks.length + task.added
    inputs, start = write_frames(length, task.before, task.after)
    is_read = np.ones(len(chunks.targets), bool)
    is_read[np.cumsum(chunks.length) - 1] = False  # the EOS that ends a stored document
    text = chunks.targets[is_read]
    position = ranges(start + len(task.before), chunks.length - 1)
    inputs[position] = text
    is_separator = np.zeros(len(inputs) + 1, np.int64)
    is_separator[position + 1] = text == task.eos_id
    separators = np.cumsum(is_separator)[:-1]  # before each position, also those of earlier documents
    types = (separators > np.repeat(separators[start], length)).astype(np.int32)
    scored = np.zeros(len(inputs), np.float32)
    scored[start if task.first else start + length - 1] = 1.0
    segments, positions, inputs, types, weights = pad_rows(
        chunks.row, length, len(rows.targets), seq_len, inputs, types, scored
    )
    labels = np.zeros((*inputs.shape, task.label_width), np.float32)
    if rows.labels is not None:
        labels[weights > 0] = rows.labels[chunks.row, chunks.column]
    has_class = not (task.multi_label or task.is_number)
    return Batch(
        inputs=inputs,
        targets=labels[..., 0].astype(np.int32) if has_class else np.zeros_like(inputs),
        weights=weights,
        segments=segments,
        positions=positions,
        sample=split_u64(samples),
        token_types=types if task.first else None,
        labels=None if has_class else labels,
        multi_label=task.multi_label,
    )
