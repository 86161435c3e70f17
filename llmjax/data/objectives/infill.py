"""Fill-in-the-middle: a chunk's middle is moved behind what surrounds it, so a causal model learns to fill gaps."""

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import Room, Rows, ranges
from llmjax.data.batches.rng import Draws, below, pick
from llmjax.data.objectives.row_chunks import halves, lay_out, shifted, take_apart
from llmjax.data.objectives.vocabulary import Vocabulary
from llmjax.errors import UserError

_MARKS = 3


def room(seq_len: int) -> Room:
    """Three marks a chunk. One more in chunks of the longest kind, which end inside their document and get an EOS."""
    longest = seq_len - _MARKS - 1
    if longest < 1:
        raise UserError(f"data.seq_len={seq_len}: objective.name='fim' adds {_MARKS + 1} tokens to a chunk; raise it")
    costs = np.arange(longest + 1) + _MARKS
    costs[-1] += 1
    return Room(seq_len=seq_len, costs=costs, name="fim")


def infill(rows: Rows, samples: np.ndarray, draws: Draws, rate: float, place: Room, known: Vocabulary) -> Batch:
    """Fill-in-the-middle (Bavarian et al., 2022, arXiv 2207.14255), by tokens, in chunks chosen by chance.

    A chosen chunk is cut at two places, all pairs alike, and reads prefix-suffix-middle or suffix-prefix-middle with
    equal chance:
        <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE EOS
        <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE EOS
    All of it is foretold, from BOS on. Other chunks are as in `causal`. `known.ids` are the prefix, middle and suffix
    marks.
    """
    pieces = take_apart(rows, samples)
    start, length = pieces.start, pieces.length
    draw = lambda purpose: draws.bits(pieces.sample, purpose, pieces.column)
    chosen, suffix_first = below(draw(0), rate), below(draw(1), 0.5)
    # An EOS is no part of the suffix: it ends the middle. A chunk that ends inside its document gets one.
    end = start + length - 1
    ends = pieces.tokens[end] == known.eos
    body = length - ends
    # Of all pairs of different places 0 to body + 1: the first, and the second less one.
    one, other = pick(draw(2), body + 2), pick(draw(3), body + 1)
    other += other >= one
    low, high = np.minimum(one, other), np.maximum(one, other) - 1

    prefix, middle, suffix, eos = pieces.tokens.size + np.arange(4)
    table = np.concatenate([pieces.tokens, known.ids, [known.eos]]).astype(np.int32)
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
    before = shifted(tokens, new_length, np.where(chosen, known.begin, pieces.before[start]))
    segments, positions, targets, inputs = lay_out(pieces.row, new_length, len(samples), place.seq_len, tokens, before)
    return Batch(
        inputs=inputs,
        targets=targets,
        weights=(segments > 0).astype(np.float32),
        segments=segments,
        positions=positions,
        sample=halves(samples),
    )
