"""Fill-in-the-middle: the middle of a chunk is moved to its end, so that a causal model learns to infill."""

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.batches.rng import CounterRng, bernoulli, randint
from llmjax.data.objectives.row_chunks import pack_rows, shift_right, split_u64, unpack_rows
from llmjax.data.objectives.vocabulary import Vocabulary
from llmjax.errors import UserError

_MARKS = 3


def row_budget(seq_len: int) -> RowBudget:
    """Three marks a chunk. One more in chunks of the longest kind, which end inside their document and get an EOS."""
    longest = seq_len - _MARKS - 1
    if longest < 1:
        raise UserError(f"data.seq_len={seq_len}: objective.name='fim' adds {_MARKS + 1} tokens to a chunk; raise it")
    costs = np.arange(longest + 1) + _MARKS
    costs[-1] += 1
    return RowBudget(seq_len=seq_len, costs=costs, name="fim")


def infill(rows: Rows, samples: np.ndarray, rng: CounterRng, rate: float, place: RowBudget, vocab: Vocabulary) -> Batch:
    """Fill-in-the-middle (Bavarian et al., 2022, arXiv 2207.14255), by tokens, in chunks chosen by chance.

    A chosen chunk is cut at two places, all pairs alike, and reads prefix-suffix-middle or suffix-prefix-middle with
    equal chance:
        <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE EOS
        <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE EOS
    All of it is predicted, from BOS on. Other chunks are as in `causal`. `vocab.ids` are the prefix, middle and suffix
    marks.
    """
    chunks = unpack_rows(rows, samples)
    start, length = chunks.start, chunks.length
    draw = lambda purpose: rng.bits(chunks.sample, purpose, chunks.column)
    chosen, suffix_first = bernoulli(draw(0), rate), bernoulli(draw(1), 0.5)
    # An EOS is no part of the suffix: it ends the middle. A chunk that ends inside its document gets one.
    end = start + length - 1
    ends = chunks.targets[end] == vocab.eos_id
    body = length - ends
    # Of all pairs of different places 0 to body + 1: the first, and the second less one.
    one, other = randint(draw(2), body + 2), randint(draw(3), body + 1)
    other += other >= one
    low, high = np.minimum(one, other), np.maximum(one, other) - 1

    prefix, middle, suffix, eos = chunks.targets.size + np.arange(4)
    table = np.concatenate([chunks.targets, vocab.ids, [vocab.eos_id]]).astype(np.int32)
    nothing = np.zeros_like(length)
    spans = {
        "plain": [(start, length)] + [(start, nothing)] * 6,
        "prefix first": [
            (prefix, 1),
            (start, low),
            (suffix, 1),
            (start + high, body - high),
            (middle, 1),
            (start + low, high - low),
            (np.where(ends, end, eos), 1),
        ],
        "suffix first": [
            (prefix, 1),
            (suffix, 1),
            (start + high, body - high),
            (middle, 1),
            (start, high),
            (start, nothing),
            (np.where(ends, end, eos), 1),
        ],
    }
    kind = np.where(chosen, np.where(suffix_first, 2, 1), 0)
    stack = lambda part: np.stack(
        [np.stack([np.broadcast_to(span[part], length.shape) for span in parts], axis=1) for parts in spans.values()]
    )[kind, np.arange(len(kind))]
    firsts, counts = stack(0), stack(1)
    tokens, new_length = table[ranges(firsts.ravel(), counts.ravel())], counts.sum(axis=1)
    before = shift_right(tokens, new_length, np.where(chosen, vocab.bos_id, chunks.inputs[start]))
    segments, positions, targets, inputs = pack_rows(
        chunks.row, new_length, len(samples), place.seq_len, tokens, before
    )
    return Batch(
        inputs=inputs,
        targets=targets,
        weights=(segments > 0).astype(np.float32),
        segments=segments,
        positions=positions,
        sample=split_u64(samples),
    )
