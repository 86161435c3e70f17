"""The order is a permutation for every size and key and looks like chance; skipped spans leave no gap, no double."""

import numpy as np
import pytest

from llmjax.data.batches.order import Permutation, Skips
from llmjax.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 99, 1000, 1023, 1025, 65_537])
def test_is_a_permutation_with_an_inverse(size):
    for epoch in range(3):
        order = Permutation(size, 7, "books", epoch)
        items = order(np.arange(size))
        np.testing.assert_array_equal(np.sort(items), np.arange(size))
        np.testing.assert_array_equal(order.inverse(items), np.arange(size))


@pytest.mark.parametrize("size", [(1 << 32) + 15, (1 << 40) - 87, 1 << 62])
def test_is_one_to_one_beyond_32_bits(size):
    order = Permutation(size, 0)
    index = np.concatenate([np.arange(500), np.arange(size - 500, size), np.arange(0, size, size // 500)])
    items = order(index)
    assert items.min() >= 0 and items.max() < size
    np.testing.assert_array_equal(order.inverse(items), index)


def test_every_part_of_the_key_changes_the_order():
    orders = [Permutation(1000, *key)(np.arange(1000)) for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12  # equal places of two random orders: Poisson of mean 1


def test_order_never_changes_between_versions():
    # Frozen values: a checkpoint of today must go on with the same samples under every later version.
    np.testing.assert_array_equal(Permutation(10, 0, "main", 0)(np.arange(10)), [7, 8, 1, 3, 2, 6, 0, 5, 9, 4])


def test_looks_random():
    size, trials = 6, 6000
    counts = np.zeros((size, size))
    for trial in range(trials):
        counts[np.arange(size), Permutation(size, trial)(np.arange(size))] += 1
    chi2 = ((counts - trials / size) ** 2 / (trials / size)).sum()
    assert chi2 < 60  # 25 degrees of freedom: mean 25, standard deviation 7; a fair order passes 60 once in 10,000
    items = Permutation(50_000, 3)(np.arange(50_000)).astype(float)
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.02  # neighbours: standard deviation 0.0045
    assert abs(np.corrcoef(items, np.arange(50_000))[0, 1]) < 0.02


def test_invalid_sizes_and_indices_are_refused():
    for size in (0, (1 << 62) + 1):
        with pytest.raises(ValueError, match="items"):
            Permutation(size)
    with pytest.raises(IndexError):
        Permutation(5)(np.array([5]))


@pytest.mark.parametrize(
    "spans", [(), ((0, 3),), ((5, 6),), ((2, 4), (4, 9), (3, 5)), ((10, 20), (1, 2)), ((0, 1), (2, 3))]
)
def test_skips_leave_exactly_the_other_samples(spans):
    skipped = {sample for a, b in spans for sample in range(a, b)}
    stay = [sample for sample in range(60) if sample not in skipped]
    skips = Skips(spans)
    np.testing.assert_array_equal(skips.sample(np.arange(len(stay))), stay)
    for sample in range(60):
        assert skips.count_unskipped(sample) == sum(other < sample for other in stay)


@pytest.mark.parametrize("span", [(3, 3), (5, 2), (-1, 4), (1.5, 2), (1, 2, 3), 7])
def test_invalid_spans_are_refused(span):
    with pytest.raises(UserError, match=r"data\.skip"):
        Skips((span,))
