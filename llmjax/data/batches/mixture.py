"""Deterministic mixture of sources: maps a global sample index to (source, index within source).

The stream is cut in blocks. Up to each block's edge a source has had its share of all samples so far, rounded by
largest remainder, so it is less than one sample off for ever. From edge to edge that rounding could take a sample back
from a source with less than one a block. Such rare sources share a rounded pool, divided by rounded halves, which never
take back: a rare source is off by half a sample for the pool and each halving, times its share of what was rounded.
"""

from collections import OrderedDict
from collections.abc import Sequence
import dataclasses
import hashlib

import numpy as np

from llmjax.data.batches.order import Permutation
from llmjax.errors import UserError, suggest

END_RULES = ("repeat", "redistribute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of constant weights from sample `start` on, before which the sources gave `before` samples."""

    start: int
    before: np.ndarray
    weights: np.ndarray


class Mixture:
    """Samples of several sources in one stream.

    names     the sources
    rows      how many samples each has in one epoch
    weights   relative shares; all None: in proportion to rows
    schedule  ((from_sample, ((name, weight), ...)), ...): later weights; a name left out gets none
    at_end    "repeat": a source goes on with its next epoch; "redistribute": its weight goes to the others
    Raises UserError for weights and schedules that mean nothing.
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
            raise UserError(f"data.mixture_block={block}: a block has 1 to {1 << 20} samples")
        if at_end not in END_RULES:
            raise UserError(f"data.at_source_end={at_end!r}: known are {', '.join(END_RULES)}")
        self.names, self.rows = tuple(names), np.array(rows, np.int64)
        self._block, self._at_end = block, at_end
        self._seed = seed
        planned = [(0, self._base_weights(weights)), *self._scheduled(schedule)]
        self._planned = planned
        made_of = [self.names, block, at_end, *((start, shares.tolist()) for start, shares in planned)]
        self._fingerprints = [
            hashlib.sha256(repr(made_of[: 4 + number]).encode()).hexdigest()[:16] for number in range(len(planned))
        ]
        self.num_samples: int | None = None  # None: endless
        self._blocks: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()  # read last
        self._segments: list[Segment] = []
        for number, (start, shares) in enumerate(planned):
            end = planned[number + 1][0] if number + 1 < len(planned) else None
            if not self._extend(start, end, shares):
                break
        self._starts = np.array([segment.start for segment in self._segments], np.int64)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, its how-manieth sample from the beginning of time) of each sample index: int64, int64."""
        source, ordinal = np.empty(samples.shape, np.int64), np.empty(samples.shape, np.int64)
        if not self._segments:
            raise IndexError("a mixture without samples")
        of = np.searchsorted(self._starts, samples, "right") - 1
        for number in np.unique(of).tolist():
            chosen = of == number
            source[chosen], ordinal[chosen] = self._within(self._segments[number], samples[chosen])
        return source, ordinal

    def counts(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each source gave: int64 [sources]."""
        if not self._segments:
            return np.zeros(len(self.names), np.int64)
        segment = self._segments[int(np.searchsorted(self._starts, samples, "right")) - 1]
        return self._counts(segment, samples)

    def fingerprint(self, samples: int) -> str:
        """16 hex digits of all that shaped the first `samples` samples: what begins later leaves it alone."""
        begun = max(1, sum(start < samples for start, _ in self._planned))
        return self._fingerprints[begun - 1]

    def _base_weights(self, weights: Sequence[float | None]) -> np.ndarray:
        given = [weight is not None for weight in weights]
        if any(given) and not all(given):
            lacking = self.names[given.index(False)]
            raise UserError(f"data.sources.{lacking}.weight is not set: give all sources a weight, or none")
        if not any(given):
            if not self.rows.sum():
                raise UserError(f"data.sources: no training tokens in {', '.join(self.names)}; give more text")
            return self.rows / self.rows.sum()
        return self._shares(zip(self.names, weights, strict=True), "data.sources.{}.weight")

    def _scheduled(self, schedule: tuple) -> list[tuple[int, np.ndarray]]:
        planned, last = [], 0
        for entry in schedule:
            try:
                start, pairs = entry
                pairs = [(str(name), float(weight)) for name, weight in pairs]
                valid = isinstance(start, int) and start > last
            except (TypeError, ValueError):
                valid = False
            if not valid:
                raise UserError(
                    f"data.weight_schedule entry {entry!r}: expected (from_sample, ((name, weight), ...)), "
                    "from_sample above 0 and rising"
                )
            planned.append((start, self._shares(pairs, f"data.weight_schedule from {start}: {{}}")))
            last = start
        return planned

    def _shares(self, pairs, where: str) -> np.ndarray:
        weights = np.zeros(len(self.names))
        for name, weight in pairs:
            if name not in self.names:
                raise UserError(f"{where.format(name)}: unknown source{suggest(name, self.names)}")
            index = self.names.index(name)
            if not (np.isfinite(weight) and weight >= 0):
                raise UserError(f"{where.format(name)}={weight}: a weight is a number from 0 up")
            if weight and not self.rows[index]:
                raise UserError(
                    f"{where.format(name)}={weight}: the source has no training tokens; give it text or weight 0"
                )
            weights[index] = weight
        if not weights.sum():
            raise UserError(f"{where.format('*')}: all weights are 0; give at least one source a weight above 0")
        return weights / weights.sum()

    def _extend(self, start: int, end: int | None, shares: np.ndarray) -> bool:
        """Add segments of these shares from `start` to `end`; False when the stream ends before `end`."""
        while True:
            before = self._counts(self._segments[-1], start) if self._segments else np.zeros_like(self.rows)
            if self._at_end == "repeat":
                self._segments.append(Segment(start=start, before=before, weights=shares))
                return True
            left = np.where(before < self.rows, shares, 0.0)
            if not left.sum():
                self.num_samples = start
                return False
            self._segments.append(Segment(start=start, before=before, weights=left / left.sum()))
            exhausted = self._exhaustion(self._segments[-1])
            if end is not None and exhausted >= end:
                return True
            start = exhausted

    def _exhaustion(self, segment: Segment) -> int:
        """The first sample of the segment that would need a row that its source no longer has."""
        room = self.rows - segment.before
        low, high = 0, int(room.sum()) // self._block + 1  # whole blocks that fit, and that don't
        while high - low > 1:
            middle = (low + high) // 2
            fits = (self._edge(segment.weights, np.array([middle]))[0] <= room).all()
            low, high = (middle, high) if fits else (low, middle)
        samples = segment.start + low * self._block + np.arange(self._block)
        source, ordinal = self._within(segment, samples)
        beyond = ordinal >= self.rows[source]
        return int(samples[np.argmax(beyond)])

    def _counts(self, segment: Segment, samples: int) -> np.ndarray:
        blocks, rest = divmod(samples - segment.start, self._block)
        counts = segment.before + self._edge(segment.weights, np.array([blocks]))[0]
        if rest:
            source, _ = self._within(segment, samples - rest + np.arange(rest))
            counts = counts + np.bincount(source, minlength=len(self.names))
        return counts

    def _within(self, segment: Segment, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, ordinal = np.empty_like(samples), np.empty_like(samples)
        blocks, place = np.divmod(samples - segment.start, self._block)
        for number in np.unique(blocks).tolist():
            chosen = blocks == number
            sources, ordinals = self._read_block(segment, number)
            source[chosen], ordinal[chosen] = sources[place[chosen]], ordinals[place[chosen]]
        return source, ordinal

    def _read_block(self, segment: Segment, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, ordinal) of every sample of a block: places stirred, each source in its own order."""
        key = (segment.start, number)
        if (known := self._blocks.get(key)) is not None:
            return known
        begin, end = self._edge(segment.weights, np.array([number, number + 1]))
        source = np.repeat(np.arange(len(self.names)), end - begin)
        source = source[Permutation(self._block, self._seed, "mixture", *key)(np.arange(self._block))]
        by_source = np.argsort(source, kind="stable")
        rank = np.empty_like(by_source)
        first = np.cumsum(end - begin) - (end - begin)
        rank[by_source] = np.arange(self._block) - first[source[by_source]]
        if len(self._blocks) > 8:
            self._blocks.popitem(last=False)
        self._blocks[key] = source, (segment.before + begin)[source] + rank
        return self._blocks[key]

    def _edge(self, weights: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """How many samples each source gave in the first `blocks` blocks of a segment: int64 [blocks, sources]."""
        total = blocks.astype(np.int64) * self._block
        rare = weights * self._block < 1.001  # with one a block the rounding can't outrun the growth
        if rare.all():
            return _halve(total, weights)
        target = total[:, None] * weights
        counts = np.floor(target).astype(np.int64)
        pool = np.floor(total * weights[rare].sum() + 0.5).astype(np.int64)
        if rare.any():
            counts[:, rare] = _halve(pool, weights[rare])
        common = np.flatnonzero(~rare)
        extra = total - pool - counts[:, common].sum(axis=1)
        ranks = np.argsort(np.argsort(counts[:, common] - target[:, common], axis=1, kind="stable"), axis=1)
        counts[:, common] += ranks < extra[:, None]
        return counts


def _halve(total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Divide totals by weights, int64 [totals, weights], so that no part ever shrinks as its total grows."""
    if len(weights) == 1:
        return total[:, None]
    cumulative = np.cumsum(weights)
    half = 1 + int(np.argmin(np.abs(cumulative[:-1] - cumulative[-1] / 2)))
    share = cumulative[half - 1] / cumulative[-1] if cumulative[-1] else 0.0
    left = np.floor(total * share + 0.5).astype(np.int64)
    return np.concatenate([_halve(left, weights[:half]), _halve(total - left, weights[half:])], axis=1)
