"""The size of each global batch, which may change at given samples (train.batch_schedule)."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import NamedTuple

from llmjax.errors import UserError

MAX_SIZE = 1 << 24  # of arrays in the host's memory, which are allocated before anything else fails


class Stretch(NamedTuple):
    """Successive batches of one size.

    first    index of the first batch
    number   of its first sample, among the samples that are not skipped
    size     samples of a batch
    """

    first: int
    number: int
    size: int


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The size of a batch is a function of its first sample alone, so that a resumed run has the same batches.

    first      samples of a batch at the start (train.global_batch)
    schedule   ((from_sample, size), ...): a batch whose first sample is that global sample index or a later one has
               this size (train.batch_schedule)
    Raises UserError for another form.
    """

    first: int
    schedule: tuple = ()

    def __post_init__(self):
        last = 0
        for entry in self.schedule:
            if not (isinstance(entry, tuple) and len(entry) == 2 and all(type(value) is int for value in entry)):
                raise UserError(
                    f"train.batch_schedule entry {entry!r}: expected (from_sample, global_batch), such as (4000, 16)"
                )
            if entry[0] <= last:
                raise UserError(f"train.batch_schedule entry {entry!r}: from_sample must be above {last}")
            if not 1 <= entry[1] <= MAX_SIZE:
                raise UserError(f"train.batch_schedule entry {entry!r}: global_batch must be from 1 to {MAX_SIZE}")
            last = entry[0]

    @property
    def fields(self) -> list[tuple[str, int]]:
        """(field of the config, size) of each size."""
        return [
            ("train.global_batch", self.first),
            *(("train.batch_schedule global_batch", size) for _, size in self.schedule),
        ]

    @property
    def largest(self) -> int:
        """The largest size."""
        return max(size for _, size in self.fields)

    def __str__(self) -> str:
        return ", ".join([f"{self.first:,}", *(f"{size:,} from sample {start:,}" for start, size in self.schedule)])

    def stretches(self, number: int, count_unskipped: Callable[[int], int]) -> Iterator[Stretch]:
        """Batches from the sample `number` on, among those that are not skipped; the last stretch has no end.

        count_unskipped   samples below a global sample index that are not skipped
        """
        index = 0
        starts = [count_unskipped(start) for start, _ in self.schedule]
        for (_, size), end in zip(self.fields, [*starts, None], strict=True):
            if end is None:
                yield Stretch(index, number, size)
            elif number < end:
                yield Stretch(index, number, size)
                count = -(-(end - number) // size)
                index, number = index + count, number + count * size


def locate_batch(stretches: Sequence[Stretch], index: int) -> tuple[int, int]:
    """(number of its first sample, size) of a batch, whose index counts from the first of the stretches."""
    stretch = next(stretch for stretch in reversed(stretches) if stretch.first <= index)
    return stretch.number + (index - stretch.first) * stretch.size, stretch.size
