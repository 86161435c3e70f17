"""Encoder-decoder objectives: span corruption, UL2 and prefix. Sources and targets fit their rows by planned costs."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows, ranges
from llmjax.data.batches.rng import CounterRng, randint
from llmjax.data.objectives.row_chunks import (
    RowChunks,
    build_causal_batch,
    draw_partition,
    pack_rows,
    pad_rows,
    shift_right,
    unpack_rows,
)
from llmjax.data.objectives.vocabulary import Vocabulary
from llmjax.errors import UserError

MAX_SENTINELS = 100  # as in published tokenizers; chunks that would need more have longer spans instead
_MULTIPLE = 8  # the row length of the decoder is rounded up to a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A way to corrupt spans of text.

    rate       fraction of a chunk's tokens that is corrupted
    mean_span  mean tokens of a corrupted span; None: the end of the chunk is the only span
    mode       index of the mode token that is put before the source
    """

    rate: float
    mean_span: float | None
    mode: int = 0

    def count_spans(self, lengths: np.ndarray, max_spans: int = MAX_SENTINELS) -> tuple[np.ndarray, np.ndarray]:
        """(corrupted tokens, spans) of chunks of these lengths, computed as in T5, with 1 to `max_spans` spans."""
        noise = np.clip(np.round(self.rate * lengths), 1, np.maximum(lengths - 1, 1)).astype(np.int64)
        if self.mean_span is None:
            return noise, np.ones_like(noise)
        spans = np.clip(np.round(noise / self.mean_span), 1, max_spans).astype(np.int64)
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

    row_budget  what a chunk needs of a row: its source, or its target scaled to the encoder's row if that is more
    target_len  positions in a row of the decoder
    sentinels   the most spans of a chunk
    """

    row_budget: RowBudget
    target_len: int
    sentinels: int


def plan_lengths(
    name: str, denoisers: Sequence[Denoiser], *, seq_len: int, target_len: int, modes: bool
) -> SpanLengths:
    """Plan the longest chunk whose source fits seq_len, the target length that it needs, and every chunk's cost.

    A chunk of l tokens with n of them corrupted in k spans has a source of l - n + k tokens (and its mode token) and a
    target of n + k + 1. `target_len` 0: what the longest chunks need, rounded up.
    Raises UserError if not even one token fits.
    """
    lengths = np.arange(1, int(seq_len / (1 - min(denoiser.rate for denoiser in denoisers))) + 3)
    noise, spans = np.stack([denoiser.count_spans(lengths) for denoiser in denoisers], axis=1)
    sources, targets = (lengths - noise + spans + modes).max(axis=0), (noise + spans + 1).max(axis=0)
    num_fitting = _first_true(sources > seq_len)
    needed = targets
    if not target_len:
        if len(denoisers) == 1:
            # As if there were no limit of sentinels, since rows of several shorter chunks have more spans than that.
            needed = np.sum(denoisers[0].count_spans(lengths, max_spans=seq_len), axis=0) + 1
        target_len = -(-int(needed[:num_fitting].max(initial=1)) // _MULTIPLE) * _MULTIPLE
    costs = np.maximum(sources, -(-targets * seq_len // target_len))
    longest = _first_true(costs > seq_len)
    if not longest:
        raise UserError(
            f"data.seq_len={seq_len} with objective.target_len={target_len}: objective.name={name!r} cannot fit "
            "even one token of text; raise them"
        )
    described = ", ".join(f"{denoiser.rate:g}/{denoiser.mean_span}" for denoiser in denoisers)
    row_budget = RowBudget(
        seq_len=seq_len,
        costs=np.concatenate([[0], costs[:longest]]),
        name=f"{name} {described}, target {target_len}",
    )
    return SpanLengths(row_budget=row_budget, target_len=target_len, sentinels=int(spans[:, :longest].max()))


def corrupt(
    rows: Rows,
    samples: np.ndarray,
    rng: CounterRng,
    denoisers: Sequence[Denoiser],
    span_lengths: SpanLengths,
    vocab: Vocabulary,
) -> Batch:
    """Span corruption (Raffel et al., 2019, arXiv 1910.10683), with several denoisers UL2 (Tay et al., 2022, arXiv
    2205.05131): one of them is drawn for each chunk.

    A sentinel replaces each corrupted span in the source; the target lists each sentinel and its span, then EOS. Unlike
    in T5, spans may be at both ends of a chunk. `vocab.ids` are the sentinels, then the mode tokens (of a mixture).
    """
    chunks = unpack_rows(rows, samples)
    which = np.zeros_like(chunks.length)
    if len(denoisers) > 1:
        which = randint(rng.bits(chunks.sample, 0, chunks.column), len(denoisers))
    noise, spans = np.zeros_like(which), np.zeros_like(which)
    for number, denoiser in enumerate(denoisers):
        chosen = which == number
        noise[chosen], spans[chosen] = denoiser.count_spans(chunks.length[chosen])
    at_end = np.array([denoiser.mean_span is None for denoiser in denoisers])[which]
    lengths = _draw_spans(chunks, noise, spans, at_end, rng)

    # Sources and targets are gathered from one table: the text, then sentinels, EOS and modes.
    first_sentinel, num_sentinels = chunks.targets.size, span_lengths.sentinels
    modes = vocab.ids[num_sentinels:]
    table = np.concatenate([chunks.targets, vocab.ids[:num_sentinels], [vocab.eos_id], modes]).astype(np.int32)
    num_slots = 2 * spans + 1  # intact and corrupted spans in turn
    slot = ranges(np.zeros_like(num_slots), num_slots)
    text = np.cumsum(lengths) - lengths
    special = first_sentinel + slot // 2
    is_corrupted = slot % 2 == 1
    source_start, source_length = np.where(is_corrupted, special, text), np.where(is_corrupted, 1, lengths)
    if modes:
        heads = np.cumsum(num_slots) - num_slots
        mode = np.array([denoiser.mode for denoiser in denoisers])[which]
        source_start = np.insert(source_start, heads, first_sentinel + num_sentinels + 1 + mode)
        source_length = np.insert(source_length, heads, 1)
    special[np.cumsum(num_slots) - 1] = first_sentinel + num_sentinels  # the last one in a target is EOS
    target_start, target_length = np.where(is_corrupted, text, special), np.where(is_corrupted, lengths, 1)
    return build_encdec_batch(
        chunks,
        samples,
        source=(table[ranges(source_start, source_length)], chunks.length - noise + spans + bool(modes)),
        target=(table[ranges(target_start, target_length)], noise + spans + 1),
        widths=(span_lengths.row_budget.seq_len, span_lengths.target_len),
        begin=vocab.bos_id,
    )


def make_prefix_budget(seq_len: int, target_len: int) -> RowBudget:
    """What `split_prefix` needs: either side may have almost all tokens of the chunk."""
    if target_len >= seq_len:
        return RowBudget(seq_len=seq_len)
    costs = -(-np.arange(target_len + 1) * seq_len // target_len)
    return RowBudget(seq_len=seq_len, costs=costs, name=f"prefix target={target_len}")


def split_prefix(
    rows: Rows, samples: np.ndarray, rng: CounterRng, seq_len: int, target_len: int, vocab: Vocabulary
) -> Batch:
    """Prefix language modelling for an encoder-decoder: it reads a prefix of a chunk and writes the rest.

    The length of the prefix is uniform, from the first input alone to all but the last token. The target ends with the
    chunk, so with EOS only at the end of the document.
    """
    chunks = unpack_rows(rows, samples)
    prefix_lengths = 1 + randint(rng.bits(chunks.sample, 0, chunks.column), chunks.length)
    target_lengths = chunks.length - prefix_lengths + 1
    return build_encdec_batch(
        chunks,
        samples,
        source=(chunks.inputs[ranges(chunks.start, prefix_lengths)], prefix_lengths),
        target=(chunks.targets[ranges(chunks.start + prefix_lengths - 1, target_lengths)], target_lengths),
        widths=(seq_len, target_len),
        begin=vocab.bos_id,
    )


def build_encdec_batch(
    chunks: RowChunks,
    samples: np.ndarray,
    *,
    source: tuple[np.ndarray, np.ndarray],
    target: tuple[np.ndarray, np.ndarray],
    widths: tuple[int, int],
    begin: int,
) -> Batch:
    """Pack sources and targets, each (tokens of all chunks, length of each chunk's), into rows of the two widths."""
    source_segments, source_positions, packed_source = pad_rows(
        chunks.row, source[1], len(samples), widths[0], source[0]
    )
    rows = pack_rows(chunks.row, target[1], len(samples), widths[1], target[0], shift_right(*target, begin))
    return dataclasses.replace(
        build_causal_batch(rows, samples),
        source=packed_source,
        source_segments=source_segments,
        source_positions=source_positions,
    )


def _draw_spans(
    chunks: RowChunks, noise: np.ndarray, spans: np.ndarray, at_end: np.ndarray, rng: CounterRng
) -> np.ndarray:
    """Draw lengths of intact and corrupted spans in turn, 2 spans + 1 a chunk; the first and last may be empty."""
    corrupted = draw_partition(noise, spans, chunks, rng, 1)
    intact = draw_partition(chunks.length - noise + 2, spans + 1, chunks, rng, 2)
    last = np.cumsum(spans + 1) - 1
    first = last - spans
    intact[first] -= 1
    intact[last] -= 1
    intact[first[at_end]], intact[last[at_end]] = (chunks.length - noise)[at_end], 0
    lengths = np.empty(int((2 * spans + 1).sum()), np.int64)
    slot = ranges(np.zeros_like(spans), 2 * spans + 1)
    lengths[slot % 2 == 0], lengths[slot % 2 == 1] = intact, corrupted
    return lengths


def _first_true(mask: np.ndarray) -> int:
    """The index of the first True; the length if there is none."""
    return int(np.argmax(mask)) if mask.any() else len(mask)
