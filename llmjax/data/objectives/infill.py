"""Fill-in-the-middle: the middle of a chunk is moved to its end, so that a causal model learns to infill."""

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.batches.rng import CounterRng, bernoulli, randint
from llmjax.data.objectives.row_chunks import build_causal_batch, pack_rows, shift_right, unpack_rows
from llmjax.data.objectives.vocabulary import Vocabulary
from llmjax.errors import UserError

_NUM_MARKERS = 3


def make_row_budget(seq_len: int) -> RowBudget:
    """Three markers a chunk, and an EOS for the longest chunks, which end inside their document."""
    longest = seq_len - _NUM_MARKERS - 1
    if longest < 1:
        raise UserError(
            f"data.seq_len={seq_len}: objective.name='fim' adds {_NUM_MARKERS + 1} tokens to a chunk; raise it"
        )
    costs = np.arange(longest + 1) + _NUM_MARKERS
    costs[-1] += 1
    return RowBudget(seq_len=seq_len, costs=costs, name="fim")


def infill(
    rows: Rows, samples: np.ndarray, rng: CounterRng, rate: float, budget: RowBudget, vocab: Vocabulary
) -> Batch:
    """Fill-in-the-middle (Bavarian et al., 2022, arXiv 2207.14255) on tokens, in random chunks.

    A chunk is chosen with probability `rate`. It is cut at two random positions, and becomes prefix-suffix-middle or
    suffix-prefix-middle with equal probability:
        <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE EOS
        <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE EOS
    All of it is predicted, from BOS on. Other chunks are as in `causal`. `vocab.ids` are the prefix, middle and suffix
    markers.
    """
    chunks = unpack_rows(rows, samples)
    start, length = chunks.start, chunks.length
    bits = lambda purpose: rng.bits(chunks.sample, purpose, chunks.column)
    chosen, suffix_first = bernoulli(bits(0), rate), bernoulli(bits(1), 0.5)
    # The EOS is not part of the suffix, but follows the middle. A chunk that ends inside its document gets an EOS.
    end = start + length - 1
    has_eos = chunks.targets[end] == vocab.eos_id
    body = length - has_eos
    # A pair of different integers in [0, body + 1], uniformly; the larger one, less 1, is the end of the middle.
    one, other = randint(bits(2), body + 2), randint(bits(3), body + 1)
    other += other >= one
    low, high = np.minimum(one, other), np.maximum(one, other) - 1

    prefix, middle, suffix, eos = chunks.targets.size + np.arange(4)
    table = np.concatenate([chunks.targets, vocab.ids, [vocab.eos_id]]).astype(np.int32)
    # The spans of `table` that a chosen chunk consists of: (start, length). Other chunks consist of themselves.
    spans = [
        (prefix, 1),
        (start, np.where(suffix_first, 0, low)),
        (suffix, 1),
        (start + high, body - high),
        (middle, 1),
        (np.where(suffix_first, start, start + low), np.where(suffix_first, high, high - low)),
        (np.where(has_eos, end, eos), 1),
    ]
    starts, lengths = (
        np.stack([np.broadcast_to(values, length.shape) for values in column], axis=1)
        for column in zip(*spans, strict=True)
    )
    starts[~chosen, 0] = start[~chosen]
    lengths[~chosen] = 0
    lengths[~chosen, 0] = length[~chosen]
    targets, new_length = table[ranges(starts.ravel(), lengths.ravel())], lengths.sum(axis=1)
    inputs = shift_right(targets, new_length, np.where(chosen, vocab.bos_id, chunks.inputs[start]))
    packed = pack_rows(chunks.row, new_length, len(samples), budget.seq_len, targets, inputs)
    return build_causal_batch(packed, samples)
