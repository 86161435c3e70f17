"""Objectives on labelled documents: labels at one position of each, or the name of its class as text."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.objectives.row_chunks import RowChunks, pad_rows, split_u64, unpack_rows, write_frames
from llmjax.data.objectives.spans import build_encdec_batch
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError


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


def make_row_budget(task: LabelTask, name: str, seq_len: int, documents: int | None = None) -> RowBudget:
    """The positions that documents need, by their stored tokens, such that a row has at most `documents`."""
    least = -(-seq_len // documents) if documents else 1
    costs = np.maximum(np.arange(seq_len - task.added + 1) + task.added, least)
    return RowBudget(seq_len=seq_len, costs=costs, name=f"{name} {len(task.before)}+{len(task.after)}")


def build_labelled_batch(rows: Rows, samples: np.ndarray, task: LabelTask, seq_len: int) -> Batch:
    """Documents in their frame, each scored at one position: a class there is the target, other labels are `labels`.

    Without labels in the rows, those of the batch are 0. The second text of a pair, after the first EOS, has token
    type 1, as in BERT (Devlin et al., 2018, arXiv 1810.04805).
    """
    chunks = unpack_rows(rows, samples)
    inputs, length, start, position = _frame_texts(chunks, task)
    text = inputs[position]
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


def find_target_len(classes: Sequence[str], seq_len: int) -> int:
    """Targets in a row of `build_named_batch`: for texts of 4 times as many tokens as the longest name has, or for one
    name. No tokenizer makes more ids of a name than its bytes and the space before it; then comes EOS."""
    return max(seq_len // 4, 2 + max(len(name.encode()) for name in classes))


def encode_names(classes: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the name of each class with EOS at its end, padded with -1: int32 [classes, width].

    Raises UserError for two classes that the tokenizer does not distinguish.
    """
    encoded = [(*ids.tolist(), tokenizer.eos_id) for ids in tokenizer.encode_batch(list(classes))]
    for number, ids in enumerate(encoded):
        if ids in encoded[:number]:
            raise UserError(
                f"data.classes: the tokenizer encodes {classes[encoded.index(ids)]!r} and {classes[number]!r} alike; "
                "rename one of them"
            )
    names = np.full((len(encoded), max(map(len, encoded))), -1, np.int32)
    for number, ids in enumerate(encoded):
        names[number, : len(ids)] = ids
    return names


def build_named_batch(
    rows: Rows, samples: np.ndarray, task: LabelTask, names: np.ndarray, widths: tuple[int, int], begin: int
) -> Batch:
    """For an encoder-decoder: it reads documents in their frame, and writes the name of the class of each.

    Every document has as many targets as the longest name; of a shorter name those after its EOS are not scored. So the
    class does not decide where targets are, and `class_names.score_names` can replace them. Without labels in the rows,
    classes are 0.

    names   from `encode_names`
    widths  positions in a row of the encoder and of the decoder
    begin   the id that the decoder reads first
    """
    chunks = unpack_rows(rows, samples)
    source, length, _, _ = _frame_texts(chunks, task)
    classes = np.zeros(len(length), np.int64)
    if rows.labels is not None:
        classes = rows.labels[chunks.row, chunks.column, 0].astype(np.int64)
    targets = names[classes].reshape(-1), np.full(len(length), names.shape[1])
    batch = build_encdec_batch(chunks, samples, source=(source, length), target=targets, widths=widths, begin=begin)
    is_scored = (batch.segments > 0) & (batch.targets >= 0)
    return dataclasses.replace(
        batch,
        inputs=np.maximum(batch.inputs, 0),
        targets=np.maximum(batch.targets, 0),
        weights=is_scored.astype(np.float32),
    )


def _frame_texts(chunks: RowChunks, task: LabelTask) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids of all documents in their frames, length of each, where each starts, where the tokens of their texts are)"""
    length = chunks.length + task.added
    ids, start = write_frames(length, task.before, task.after)
    is_read = np.ones(len(chunks.targets), bool)
    is_read[np.cumsum(chunks.length) - 1] = False  # the EOS that ends a stored document
    position = ranges(start + len(task.before), chunks.length - 1)
    ids[position] = chunks.targets[is_read]
    return ids, length, start, position
