"""Split packed rows into their chunks, and pack chunks into rows."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import Rows, ranges
from llmjax.data.batches.rng import CounterRng


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowChunks:
    """The chunks of rows, one after the other.

    targets, inputs  int32 [tokens], of all chunks; see Rows
    length           int64 [chunks], tokens of each
    row              int64 [chunks], the row of each
    sample, column   int64 [chunks], the row's sample index, and where in the row the chunk begins: they key its draws
    """

    targets: np.ndarray
    inputs: np.ndarray
    length: np.ndarray
    row: np.ndarray
    sample: np.ndarray
    column: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """Where each chunk begins in `targets`: int64 [chunks]."""
        return np.cumsum(self.length) - self.length


def unpack_rows(rows: Rows, samples: np.ndarray) -> RowChunks:
    """Split rows with these sample indices into their chunks."""
    real = rows.segments > 0
    row, column = np.nonzero(real & (rows.positions == 0))
    start = np.flatnonzero(rows.positions[real] == 0)
    targets = rows.targets[real]
    return RowChunks(
        targets=targets,
        inputs=rows.inputs[real],
        length=np.diff(start, append=targets.size),
        row=row,
        sample=samples[row],
        column=column,
    )


def shift_right(tokens: np.ndarray, length: np.ndarray, first: np.ndarray | int) -> np.ndarray:
    """The token before each in its chunk, or `first` at the start: the inputs from which `tokens` are predicted."""
    inputs = np.empty_like(tokens)
    inputs[1:] = tokens[:-1]
    inputs[np.cumsum(length) - length] = first
    return inputs


def build_causal_batch(rows: Rows, samples: np.ndarray) -> Batch:
    """Next-token prediction: every token, including the first and the EOS, is predicted from those before it.

    Of dialogues only what the assistant writes is scored.

    samples  the rows' global sample indices, int64 [batch]
    """
    return Batch(
        inputs=rows.inputs,
        targets=rows.targets,
        weights=rows.scored.astype(np.float32),
        segments=rows.segments,
        positions=rows.positions,
        sample=split_u64(samples),
    )


def pack_rows(
    row: np.ndarray, length: np.ndarray, num_rows: int, width: int, targets: np.ndarray, inputs: np.ndarray
) -> Rows:
    """Pack the targets and inputs of chunks, int32 [tokens] each, in row order into rows of `width` positions.

    row, length  int64 [chunks]: the row of each chunk, and its tokens
    The plan guarantees that the chunks of a row fit.
    """
    segments, positions, targets, inputs = pad_rows(row, length, num_rows, width, targets, inputs)
    return Rows(targets=targets, inputs=inputs, segments=segments, positions=positions, scored=segments > 0)


def pad_rows(
    row: np.ndarray, length: np.ndarray, num_rows: int, width: int, *flat: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The same for any number of arrays: (segments, positions, *each of `flat`), all [num_rows, width]."""
    used = np.bincount(row, weights=length, minlength=num_rows).astype(np.int64)
    assert used.max(initial=0) <= width, f"a row of {width} positions got {used.max()} tokens"
    counts = np.bincount(row, minlength=num_rows)
    number = 1 + ranges(np.zeros_like(counts), counts)
    values = (np.repeat(number.astype(np.int32), length), ranges(np.zeros_like(length), length).astype(np.int32), *flat)
    is_used = np.arange(width) < used[:, None]
    padded = tuple(np.zeros((num_rows, width), value.dtype) for value in values)
    for out, value in zip(padded, values, strict=True):
        out[is_used] = value
    return padded


def write_frames(length: np.ndarray, before: Sequence[int], after: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, start): texts of these lengths with their frames, one after another: the ids `before` at the start of each,
    the ids `after` at its end, and 0 between; and where each starts."""
    start = np.cumsum(length) - length
    ids = np.zeros(int(length.sum()), np.int32)
    for offset, token_id in enumerate(before):
        ids[start + offset] = token_id
    for offset, token_id in enumerate(reversed(after)):
        ids[start + length - 1 - offset] = token_id
    return ids, start


def draw_partition(
    total: np.ndarray, parts: np.ndarray, chunks: RowChunks, rng: CounterRng, purpose: int
) -> np.ndarray:
    """Divide each chunk's total into a number of parts of at least 1, uniformly at random: int64 [sum of parts].

    total, parts  int64 [chunks]; 1 <= parts <= total < 2**20
    """
    if len(total) > 1 << 20:  # the sort below has 20 bits for the chunk
        halves = []
        for half in (slice(0, len(total) // 2), slice(len(total) // 2, None)):
            half_chunks = dataclasses.replace(chunks, sample=chunks.sample[half], column=chunks.column[half])
            halves.append(draw_partition(total[half], parts[half], half_chunks, rng, purpose))
        return np.concatenate(halves)
    # The edges between parts are those parts - 1 of the total - 1 inner positions that draw the smallest numbers.
    sizes, chosen = total - 1, parts - 1
    chunk = np.repeat(np.arange(len(total)), sizes)
    position = ranges(np.zeros_like(sizes), sizes)
    bits = rng.bits(chunks.sample[chunk], purpose, (chunks.column[chunk] << 20) + position) >> np.uint64(40)
    low = np.uint64((1 << 20) - 1)
    keys = np.sort((chunk << 44 | position).astype(np.uint64) | bits << np.uint64(20))
    keys = keys[ranges(np.cumsum(sizes) - sizes, chosen)]
    edges = (np.sort((keys >> np.uint64(44) << np.uint64(20)) | (keys & low)) & low).astype(np.int64) + 1
    last = np.cumsum(parts) - 1
    ends = np.zeros(int(parts.sum()), np.int64)
    inner = np.ones(len(ends), bool)
    inner[last] = False
    ends[inner], ends[last] = edges, total
    lengths = np.diff(ends, prepend=0)
    lengths[last[:-1] + 1] = ends[last[:-1] + 1]
    return lengths


def split_u64(samples: np.ndarray) -> np.ndarray:
    """The high and the low halves of sample indices, as a Batch has them: uint32 [samples, 2]."""
    return np.stack([samples >> 32, samples & 0xFFFFFFFF], axis=-1).astype(np.uint32)
