"""Deterministic mixture of sources: maps a global sample index to (source, index within source).

The stream is cut into blocks. At the end of each block a source has had its share of all samples so far, rounded by
largest remainder, so its count is always less than one sample off. For a source with less than one sample a block, this
rounding could make the count shrink from one block to the next. Such rare sources get a rounded total together, which
is divided by rounded halving, so that no count ever shrinks; a rare source is then off by at most half a sample for the
total and for each halving.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import hashlib

import numpy as np

from llmjax.data.batches.order import Permutation
from llmjax.errors import UserError, suggest

END_RULES = ("repeat", "redistribute")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # compared and hashed by identity
class Segment:
    """A stretch of constant weights from sample `start` on; `earlier` counts the samples of each source before it."""

    start: int
    earlier: np.ndarray
    weights: np.ndarray


class Mixture:
    """Samples of several sources in one stream.

    names     the sources
    rows      samples of each source in one epoch
    weights   relative shares; all None: in proportion to rows
    block     samples in a block
    schedule  ((from_sample, ((name, weight), ...)), ...): later weights; a name that is not listed gets none
    at_end    "repeat": a source continues with its next epoch; "redistribute": its weight goes to the others
    Raises UserError for invalid weights and schedules.
    """

    def __init__(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        weights: Sequence[float | None],
        *,
        block: int,
        schedule: tuple = (),
        at_end: str = "repeat",
        seed: int = 0,
    ):
        if not 1 <= block <= 1 << 20:
            raise UserError(f"data.mixture_block={block}: expected 1 to {1 << 20} samples")
        if at_end not in END_RULES:
            raise UserError(f"data.at_source_end={at_end!r}: expected one of {', '.join(END_RULES)}")
        self.names, self.rows = tuple(names), np.array(rows, np.int64)
        self._block, self._at_end, self._seed = block, at_end, seed
        self._schedule = [(0, self._parse_weights(weights)), *self._parse_schedule(schedule)]
        identity = [self.names, block, at_end, *((start, shares.tolist()) for start, shares in self._schedule)]
        self._fingerprints = [
            hashlib.sha256(repr(identity[: 4 + number]).encode()).hexdigest()[:16]
            for number in range(len(self._schedule))
        ]
        self.num_samples: int | None = None  # None: endless
        self._read_block = functools.lru_cache(8)(self._read_block)
        self._segments: list[Segment] = []
        ends = [start for start, _ in self._schedule[1:]]
        for (start, shares), end in zip(self._schedule, [*ends, None], strict=True):
            if not self._add_segments(start, end, shares):
                break
        self._starts = np.array([segment.start for segment in self._segments], np.int64)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index among all samples of that source, all epochs counted) of each sample index: int64, int64."""
        source, ordinal = np.empty(samples.shape, np.int64), np.empty(samples.shape, np.int64)
        if not self._segments:
            raise IndexError("the mixture has no samples")
        segments = np.searchsorted(self._starts, samples, "right") - 1
        for number in np.unique(segments).tolist():
            chosen = segments == number
            source[chosen], ordinal[chosen] = self._locate_in(self._segments[number], samples[chosen])
        return source, ordinal

    def count_samples(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples are from each source: int64 [sources]."""
        if not self._segments:
            return np.zeros(len(self.names), np.int64)
        segment = self._segments[int(np.searchsorted(self._starts, samples, "right")) - 1]
        return self._count_samples(segment, samples)

    def fingerprint(self, samples: int) -> str:
        """16 hex digits that cover everything that decides the first `samples` samples, and nothing else."""
        started = max(1, sum(start < samples for start, _ in self._schedule))
        return self._fingerprints[started - 1]

    def _parse_weights(self, weights: Sequence[float | None]) -> np.ndarray:
        set_weights = [weight for weight in weights if weight is not None]
        if set_weights and None in weights:
            name = self.names[weights.index(None)]
            raise UserError(f"data.sources.{name}.weight is not set: give all sources a weight, or none")
        if not set_weights:
            if not self.rows.sum():
                raise UserError(f"data.sources: no training tokens in {', '.join(self.names)}; give more text")
            return self.rows / self.rows.sum()
        return self._normalize(zip(self.names, set_weights, strict=True), "data.sources.{}.weight")

    def _parse_schedule(self, schedule: tuple) -> list[tuple[int, np.ndarray]]:
        parsed, last = [], 0
        for entry in schedule:
            try:
                start, pairs = entry
                pairs = [(str(name), float(weight)) for name, weight in pairs]
                if not isinstance(start, int) or start <= last:
                    raise ValueError
            except (TypeError, ValueError):
                raise UserError(
                    f"data.weight_schedule entry {entry!r}: expected (from_sample, ((name, weight), ...)), "
                    "from_sample above 0 and rising"
                ) from None
            parsed.append((start, self._normalize(pairs, f"data.weight_schedule from {start}: {{}}")))
            last = start
        return parsed

    def _normalize(self, pairs: Iterable[tuple[str, float]], where: str) -> np.ndarray:
        """Shares that sum to 1, one for each source: float64 [sources]."""
        weights = np.zeros(len(self.names))
        for name, weight in pairs:
            if name not in self.names:
                raise UserError(f"{where.format(name)}: unknown source{suggest(name, self.names)}")
            index = self.names.index(name)
            if not (np.isfinite(weight) and weight >= 0):
                raise UserError(f"{where.format(name)}={weight}: expected a number from 0 up")
            if weight and not self.rows[index]:
                raise UserError(
                    f"{where.format(name)}={weight}: the source has no training tokens; give it text or weight 0"
                )
            weights[index] = weight
        if not weights.sum():
            raise UserError(f"{where.format('*')}: all weights are 0; give at least one source a weight above 0")
        return weights / weights.sum()

    def _add_segments(self, start: int, end: int | None, shares: np.ndarray) -> bool:
        """Add segments with these shares from `start` to `end`; False if the stream ends before `end`."""
        while True:
            earlier = self._count_samples(self._segments[-1], start) if self._segments else np.zeros_like(self.rows)
            if self._at_end == "repeat":
                self._segments.append(Segment(start=start, earlier=earlier, weights=shares))
                return True
            remaining = np.where(earlier < self.rows, shares, 0.0)
            if not remaining.sum():
                self.num_samples = start
                return False
            self._segments.append(Segment(start=start, earlier=earlier, weights=remaining / remaining.sum()))
            start = self._find_exhausted(self._segments[-1])
            if end is not None and start >= end:
                return True

    def _find_exhausted(self, segment: Segment) -> int:
        """The first sample of the segment whose source has no more rows."""
        remaining = self.rows - segment.earlier
        low, high = 0, int(remaining.sum()) // self._block + 1  # numbers of blocks that fit, and that do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = (self._count_after_blocks(segment.weights, np.array([middle]))[0] <= remaining).all()
            low, high = (middle, high) if fits else (low, middle)
        samples = segment.start + low * self._block + np.arange(self._block)
        source, ordinal = self._locate_in(segment, samples)
        beyond = ordinal >= self.rows[source]
        return int(samples[np.argmax(beyond)])

    def _count_samples(self, segment: Segment, samples: int) -> np.ndarray:
        blocks, rest = divmod(samples - segment.start, self._block)
        counts = segment.earlier + self._count_after_blocks(segment.weights, np.array([blocks]))[0]
        if rest:
            source, _ = self._locate_in(segment, samples - rest + np.arange(rest))
            counts = counts + np.bincount(source, minlength=len(self.names))
        return counts

    def _locate_in(self, segment: Segment, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, ordinal = np.empty_like(samples), np.empty_like(samples)
        blocks, offset = np.divmod(samples - segment.start, self._block)
        for number in np.unique(blocks).tolist():
            chosen = blocks == number
            sources, ordinals = self._read_block(segment, number)
            source[chosen], ordinal[chosen] = sources[offset[chosen]], ordinals[offset[chosen]]
        return source, ordinal

    def _read_block(self, segment: Segment, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, ordinal) of every sample of a block: sources shuffled, the samples of each source in order."""
        begin, end = self._count_after_blocks(segment.weights, np.array([number, number + 1]))
        source = np.repeat(np.arange(len(self.names)), end - begin)
        source = source[Permutation(self._block, self._seed, "mixture", segment.start, number)(np.arange(self._block))]
        by_source = np.argsort(source, kind="stable")
        rank = np.empty_like(by_source)
        first = np.cumsum(end - begin) - (end - begin)
        rank[by_source] = np.arange(self._block) - first[source[by_source]]
        return source, (segment.earlier + begin)[source] + rank

    def _count_after_blocks(self, weights: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Samples of each source in the first `blocks` blocks of a segment: int64 [blocks, sources]."""
        total = blocks.astype(np.int64) * self._block
        rare = weights * self._block < 1.001  # with one sample a block or more, rounding never exceeds the growth
        if rare.all():
            return _divide(total, weights)
        target = total[:, None] * weights
        counts = np.floor(target).astype(np.int64)
        rare_total = np.floor(total * weights[rare].sum() + 0.5).astype(np.int64)
        if rare.any():
            counts[:, rare] = _divide(rare_total, weights[rare])
        common = np.flatnonzero(~rare)
        extra = total - rare_total - counts[:, common].sum(axis=1)
        ranks = np.argsort(np.argsort(counts[:, common] - target[:, common], axis=1, kind="stable"), axis=1)
        counts[:, common] += ranks < extra[:, None]
        return counts


def _divide(total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Divide totals by weights so that no part shrinks when its total grows: int64 [totals, weights]."""
    if len(weights) == 1:
        return total[:, None]
    cumulative = np.cumsum(weights)
    half = 1 + int(np.argmin(np.abs(cumulative[:-1] - cumulative[-1] / 2)))
    share = cumulative[half - 1] / cumulative[-1] if cumulative[-1] else 0.0
    first = np.floor(total * share + 0.5).astype(np.int64)
    return np.concatenate([_divide(first, weights[:half]), _divide(total - first, weights[half:])], axis=1)
