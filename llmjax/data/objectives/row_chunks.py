"""Split packed rows into their chunks, and pack the chunks of an objective into rows again."""

import dataclasses

import numpy as np

from llmjax.data.batches.packing import Rows, ranges
from llmjax.data.batches.rng import CounterRng


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowChunks:
    """The chunks of rows, one after the other.

    tokens, before  int32 [tokens], of all chunks; see Rows
    length          int64 [chunks]
    row             int64 [chunks], the row of each
    sample, column  int64 [chunks], the row's sample index, and where in the row the chunk begins: they key its draws
    """

    targets: np.ndarray
    inputs: np.ndarray
    length: np.ndarray
    row: np.ndarray
    sample: np.ndarray
    column: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """Where each chunk begins in `tokens`: int64 [chunks]."""
        return np.cumsum(self.length) - self.length


def unpack_rows(rows: Rows, samples: np.ndarray) -> RowChunks:
    """The chunks of rows with these sample indices."""
    real = rows.segments > 0
    row, column = np.nonzero(real & (rows.positions == 0))
    start = np.flatnonzero(rows.positions[real] == 0)
    tokens = rows.targets[real]
    return RowChunks(
        targets=tokens,
        inputs=rows.inputs[real],
        length=np.diff(start, append=tokens.size),
        row=row,
        sample=samples[row],
        column=column,
    )


def shift_right(tokens: np.ndarray, length: np.ndarray, first: np.ndarray | int) -> np.ndarray:
    """The token before each in its chunk, `first` at its start: what a decoder reads to predict `tokens`."""
    before = np.empty_like(tokens)
    before[1:] = tokens[:-1]
    before[np.cumsum(length) - length] = first
    return before


def pack_rows(
    row: np.ndarray, length: np.ndarray, num_rows: int, width: int, *flat: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Rows of `width` places from chunks in row order: (segments, positions, *each of `flat`), all [num_rows, width].

    Raises AssertionError for a row that is too full: the plan left room for what an objective makes at most.
    """
    used = np.bincount(row, weights=length, minlength=num_rows).astype(np.int64)
    assert used.max(initial=0) <= width, f"a row of {width} places was given {used.max()} tokens"
    counts = np.bincount(row, minlength=num_rows)
    number = 1 + ranges(np.zeros_like(counts), counts)
    values = (np.repeat(number.astype(np.int32), length), ranges(np.zeros_like(length), length).astype(np.int32), *flat)
    places = np.arange(width) < used[:, None]
    laid = tuple(np.zeros((num_rows, width), value.dtype) for value in values)
    for out, value in zip(laid, values, strict=True):
        out[places] = value
    return laid


def random_partition(
    total: np.ndarray, parts: np.ndarray, chunks: RowChunks, rng: CounterRng, purpose: int
) -> np.ndarray:
    """Each chunk's total as a sum of so many parts of at least 1, all such sums alike: int64 [sum of parts].

    total, parts  int64 [chunks]; 1 <= parts <= total < 2**20
    """
    if len(total) > 1 << 20:  # the sort below has 20 bits for the chunk
        half, cut = len(total) // 2, lambda values, part: values[part]
        both = []
        for part in (slice(0, half), slice(half, None)):
            some = dataclasses.replace(chunks, sample=cut(chunks.sample, part), column=cut(chunks.column, part))
            both.append(random_partition(total[part], parts[part], some, rng, purpose))
        return np.concatenate(both)
    # The edges between parts are the parts - 1 of total - 1 places that draw the smallest numbers.
    sizes, chosen = total - 1, parts - 1
    chunk = np.repeat(np.arange(len(total)), sizes)
    place = ranges(np.zeros_like(sizes), sizes)
    drawn = rng.bits(chunks.sample[chunk], purpose, (chunks.column[chunk] << 20) + place) >> np.uint64(40)
    low = np.uint64((1 << 20) - 1)
    keys = np.sort((chunk << 44 | place).astype(np.uint64) | drawn << np.uint64(20))
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
    """The high and the low words of sample indices, as a Batch has them: uint32 [samples, 2]."""
    return np.stack([samples >> 32, samples & 0xFFFFFFFF], axis=-1).astype(np.uint32)
