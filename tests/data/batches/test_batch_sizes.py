"""train.batch_schedule: the size of a batch depends on its first sample alone."""

import pytest

from llmjax.data.batches.batch_sizes import BatchSizes
from llmjax.errors import UserError


def sizes_of(sizes: BatchSizes, number: int, count: int) -> list[tuple[int, int]]:
    """(number of the first sample, size) of the next batches, none of whose samples is skipped."""
    stretches, batches = list(sizes.stretches(number, lambda sample: sample)), []
    for index in range(count):
        stretch = [stretch for stretch in stretches if stretch.first <= index][-1]
        batches.append((stretch.number + (index - stretch.first) * stretch.size, stretch.size))
    return batches


def test_a_batch_grows_where_its_first_sample_reaches_the_entry():
    """10 is inside the third batch of 4, and 12 inside none: the batch that begins at 12 is the first of 8."""
    sizes = BatchSizes(4, ((10, 8), (21, 2)))
    batches = sizes_of(sizes, 0, 7)
    assert batches == [(0, 4), (4, 4), (8, 4), (12, 8), (20, 8), (28, 2), (30, 2)]
    for number, (first, _) in enumerate(batches):  # wherever a run is resumed
        assert sizes_of(sizes, first, 7 - number) == batches[number:]
    assert sizes.largest == 8 and str(sizes) == "4, 8 from sample 10, 2 from sample 21"


def test_an_entry_that_a_batch_jumps_over_is_never_used():
    assert sizes_of(BatchSizes(16, ((3, 2), (5, 4))), 0, 3) == [(0, 16), (16, 4), (20, 4)]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((10, 8), (10, 4)), r"entry \(10, 4\): from_sample must be above 10"),
        (((0, 8),), r"entry \(0, 8\): from_sample must be above 0"),
        (((10, 0),), r"entry \(10, 0\): global_batch must be from 1 to"),
        (((10, 8.0),), r"entry \(10, 8.0\): expected \(from_sample, global_batch\)"),
        ((10, 8), r"entry 10: expected"),
    ],
)
def test_another_form_is_refused(schedule, message):
    with pytest.raises(UserError, match=f"train.batch_schedule {message}"):
        BatchSizes(4, schedule)
