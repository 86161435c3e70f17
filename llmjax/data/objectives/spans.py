"""Encoder-decoder objectives: span corruption, UL2 and prefix; sources and targets fit their rows by planned costs."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.batches.rng import CounterRng, randint
from llmjax.data.objectives.row_chunks import (
    RowChunks,
    pack_rows,
    random_partition,
    shift_right,
    split_u64,
    unpack_rows,
)
from llmjax.data.objectives.vocabulary import Vocabulary
from llmjax.errors import UserError

MOST_SENTINELS = 100  # as published tokenizers have; chunks that would need more have longer spans instead
_MULTIPLE = 8  # the decoder's row length is rounded up to one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One way to hide text.

    rate       share of a chunk's tokens that is hidden
    mean_span  mean tokens of a hidden span; None: the chunk's end is the only span
    mode       number of the mode token that stands before the source
    """

    rate: float
    mean_span: float | None
    mode: int = 0

    def counts(self, lengths: np.ndarray, most: int = MOST_SENTINELS) -> tuple[np.ndarray, np.ndarray]:
        """(hidden tokens, spans) of chunks of these lengths; T5's arithmetic, and at least one and `most` spans."""
        noise = np.clip(np.round(self.rate * lengths), 1, np.maximum(lengths - 1, 1)).astype(np.int64)
        if self.mean_span is None:
            return noise, np.ones_like(noise)
        spans = np.clip(np.round(noise / self.mean_span), 1, most).astype(np.int64)
        return noise, np.minimum(spans, np.minimum(noise, lengths - noise + 1))


# R: regular, S: sequential, X: extreme; the seven denoisers of table 1 of arXiv 2205.05131.
UL2 = (
    Denoiser(rate=0.15, mean_span=3.0, mode=0),
    Denoiser(rate=0.15, mean_span=8.0, mode=0),
    Denoiser(rate=0.25, mean_span=None, mode=1),
    Denoiser(rate=0.5, mean_span=3.0, mode=2),
    Denoiser(rate=0.5, mean_span=8.0, mode=2),
    Denoiser(rate=0.15, mean_span=64.0, mode=2),
    Denoiser(rate=0.5, mean_span=64.0, mode=2),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanLengths:
    """Lengths of sources and targets, planned for all chunks.

    room        what a chunk takes of a row: its source, or its target scaled to the encoder's row if that is more
    target_len  places in a row of the decoder
    sentinels   spans of a chunk at most
    """

    row_budget: RowBudget
    target_len: int
    sentinels: int


def plan_lengths(
    name: str, denoisers: Sequence[Denoiser], *, seq_len: int, target_len: int, modes: bool
) -> SpanLengths:
    """The longest chunk whose source fits seq_len, the target length that its target needs, and every chunk's cost.

    A chunk of l tokens with n of them hidden in k spans has a source of l - n + k tokens (and its mode token) and a
    target of n + k + 1. `target_len` 0: what the longest chunks need, rounded up.
    Raises UserError where not even one token fits.
    """
    lengths = np.arange(1, int(seq_len / (1 - min(denoiser.rate for denoiser in denoisers))) + 3)
    noise, spans = np.stack([denoiser.counts(lengths) for denoiser in denoisers], axis=1)
    sources, targets = (lengths - noise + spans + modes).max(axis=0), (noise + spans + 1).max(axis=0)
    fit = _first(sources > seq_len)
    if not target_len:
        # Alone, as if sentinels had no limit: rows of shorter chunks, which stay below it, need that much.
        ample = np.sum(denoisers[0].counts(lengths, most=seq_len), axis=0) + 1 if len(denoisers) == 1 else targets
        target_len = -(-int(ample[:fit].max(initial=1)) // _MULTIPLE) * _MULTIPLE
    costs = np.maximum(sources, -(-targets * seq_len // target_len))
    longest = _first(costs > seq_len)
    if not longest:
        raise UserError(
            f"data.seq_len={seq_len} with objective.target_len={target_len}: not even one token of text fits what "
            f"objective.name={name!r} makes of it; raise them"
        )
    described = ", ".join(f"{denoiser.rate:g}/{denoiser.mean_span}" for denoiser in denoisers)
    room = RowBudget(
        seq_len=seq_len,
        costs=np.concatenate([[0], costs[:longest]]),
        name=f"{name} {described}, target {target_len}",
    )
    return SpanLengths(row_budget=room, target_len=target_len, sentinels=int(spans[:, :longest].max()))


def corrupt(
    rows: Rows,
    samples: np.ndarray,
    rng: CounterRng,
    denoisers: Sequence[Denoiser],
    span_lengths: SpanLengths,
    vocab: Vocabulary,
) -> Batch:
    """Span corruption (Raffel et al., 2019, arXiv 1910.10683) by one denoiser, or by a mixture of them drawn for each
    chunk (UL2: Tay et al., 2022, arXiv 2205.05131).

    Each hidden span is replaced by a sentinel in the source; the target holds each sentinel and what it hides, then
    EOS. Unlike T5's, spans may stand at both ends of a chunk. `vocab.ids` are the sentinels, then the mode tokens (of
    a mixture).
    """
    chunks = unpack_rows(rows, samples)
    which = np.zeros_like(chunks.length)
    if len(denoisers) > 1:
        which = randint(rng.bits(chunks.sample, 0, chunks.column), len(denoisers))
    noise, spans = np.zeros_like(which), np.zeros_like(which)
    for number, denoiser in enumerate(denoisers):
        chosen = which == number
        noise[chosen], spans[chosen] = denoiser.counts(chunks.length[chosen])
    at_end = np.array([denoiser.mean_span is None for denoiser in denoisers])[which]
    lengths = _interleaved(chunks, noise, spans, at_end, rng)

    # Text is numbered by its place, what stands for no text by the places behind it: sentinels, EOS, modes.
    first_mark, num_sentinels = chunks.targets.size, span_lengths.sentinels
    modes = vocab.ids[num_sentinels:]
    table = np.concatenate([chunks.targets, vocab.ids[:num_sentinels], [vocab.eos_id], modes]).astype(np.int32)
    slots = 2 * spans + 1
    slot = ranges(np.zeros_like(slots), slots)
    text = np.cumsum(lengths) - lengths
    mark = first_mark + slot // 2
    hidden = slot % 2 == 1
    source_start, source_length = np.where(hidden, mark, text), np.where(hidden, 1, lengths)
    if modes:
        heads = np.cumsum(slots) - slots
        mode = np.array([denoiser.mode for denoiser in denoisers])[which]
        source_start = np.insert(source_start, heads, first_mark + num_sentinels + 1 + mode)
        source_length = np.insert(source_length, heads, 1)
    mark[np.cumsum(slots) - 1] = first_mark + num_sentinels
    target_start, target_length = np.where(hidden, text, mark), np.where(hidden, lengths, 1)
    return encdec_batch(
        chunks,
        samples,
        source=(table[ranges(source_start, source_length)], chunks.length - noise + spans + bool(modes)),
        target=(table[ranges(target_start, target_length)], noise + spans + 1),
        widths=(span_lengths.row_budget.seq_len, span_lengths.target_len),
        begin=vocab.bos_id,
    )


def split_prefix_budget(seq_len: int, target_len: int) -> RowBudget:
    """What `halve` needs: either side may hold nearly the whole chunk."""
    if target_len >= seq_len:
        return RowBudget(seq_len=seq_len)
    costs = -(-np.arange(target_len + 1) * seq_len // target_len)
    return RowBudget(seq_len=seq_len, costs=costs, name=f"prefix target={target_len}")


def split_prefix(
    rows: Rows, samples: np.ndarray, rng: CounterRng, seq_len: int, target_len: int, vocab: Vocabulary
) -> Batch:
    """Prefix language modelling for an encoder-decoder: the encoder reads a chunk's begin, the decoder writes the rest.

    Every split is alike: from the first token predicted to the last alone. The source starts as a prompt does, and the
    target ends where the chunk does: with EOS where the document ends.
    """
    chunks = unpack_rows(rows, samples)
    given = 1 + randint(rng.bits(chunks.sample, 0, chunks.column), chunks.length)
    return encdec_batch(
        chunks,
        samples,
        source=(chunks.inputs[ranges(chunks.start, given)], given),
        target=(
            chunks.targets[ranges(chunks.start + given - 1, chunks.length - given + 1)],
            chunks.length - given + 1,
        ),
        widths=(seq_len, target_len),
        begin=vocab.bos_id,
    )


def encdec_batch(
    chunks: RowChunks,
    samples: np.ndarray,
    *,
    source: tuple[np.ndarray, np.ndarray],
    target: tuple[np.ndarray, np.ndarray],
    widths: tuple[int, int],
    begin: int,
) -> Batch:
    """The Batch of sources and targets (tokens of all chunks, length of each chunk's) in rows of two widths."""
    read = pack_rows(chunks.row, source[1], len(samples), widths[0], source[0])
    before = shift_right(*target, begin)
    segments, positions, targets, inputs = pack_rows(chunks.row, target[1], len(samples), widths[1], target[0], before)
    return Batch(
        inputs=inputs,
        targets=targets,
        weights=(segments > 0).astype(np.float32),
        segments=segments,
        positions=positions,
        sample=split_u64(samples),
        source=read[2],
        source_segments=read[0],
        source_positions=read[1],
    )


def _interleaved(
    chunks: RowChunks, noise: np.ndarray, spans: np.ndarray, at_end: np.ndarray, rng: CounterRng
) -> np.ndarray:
    """Lengths of what stays and what is hidden in turn, 2 spans + 1 a chunk, first and last staying and maybe empty."""
    hidden = random_partition(noise, spans, chunks, rng, 1)
    stays = random_partition(chunks.length - noise + 2, spans + 1, chunks, rng, 2)
    last = np.cumsum(spans + 1) - 1
    first = last - spans
    stays[first] -= 1
    stays[last] -= 1
    stays[first[at_end]], stays[last[at_end]] = (chunks.length - noise)[at_end], 0
    lengths = np.empty(int((2 * spans + 1).sum()), np.int64)
    slot = ranges(np.zeros_like(spans), 2 * spans + 1)
    lengths[slot % 2 == 0], lengths[slot % 2 == 1] = stays, hidden
    return lengths


def _first(found: np.ndarray) -> int:
    """The place of the first True; the length where there is none."""
    return int(np.argmax(found)) if found.any() else len(found)
