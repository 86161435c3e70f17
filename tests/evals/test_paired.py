"""Paired tests against scipy, published numbers, and differences that are known."""

import numpy as np
import pytest
import scipy.stats

from llmjax.evals.paired import compare_means, compare_statistics, flip_signs, holm, mcnemar


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [
        (150, 86, 3.716e-05),  # Agresti's two surveys of approval, by the R package exact2x2
        (1, 9, 2 * (1 + 10) / 1024),
        (5, 5, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_exact(only_first, only_second, expected):
    assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-3)
    assert mcnemar(only_second, only_first) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the usual example: the first and the last are rejected
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # as p.adjust(p, "holm") of R
        ([0.6, 0.7], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


def test_sign_flips_agree_with_scipy():
    differences = np.random.default_rng(1).normal(0.2, 1, 12)
    exact = scipy.stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=10_000)
    assert 0.01 < exact.pvalue < 0.9  # of all 4,096 flips
    assert flip_signs(differences) == pytest.approx(exact.pvalue, abs=0.015)
    assert flip_signs(np.zeros(5)) == 1.0
    # Sums of the same numbers in another order count as equal: of 2 x 0.1, half of the flips are as large.
    assert flip_signs(np.array([0.1, 0.2, 0.3])) == pytest.approx(0.25, abs=0.02)


def test_a_constant_difference_has_an_interval_without_width():
    first = np.random.default_rng(0).normal(size=200)
    test = compare_means(first, first + 0.25)
    difference = test.difference
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.25,) * 3)
    assert (test.num_higher, test.num_lower, test.name) == (200, 0, "sign flips")
    assert test.p_value == 1e-4  # the least that 9,999 flips give
    same = compare_means(first, first)
    assert same.difference.value == 0 and same.p_value == 1.0


def test_scores_of_0_or_1_take_the_exact_test_and_a_paired_interval():
    rng = np.random.default_rng(2)
    first = (rng.random(400) < 0.7).astype(float)
    second = np.where(rng.random(400) < 0.2, 1.0, first)
    test = compare_means(first, second)
    wins = int((second > first).sum())
    assert test.name == "exact McNemar" and (test.num_higher, test.num_lower) == (wins, 0)
    assert test.p_value == pytest.approx(2 * 0.5**wins)
    # Pairing takes out what both have in common: the normal interval of the differences.
    half = 1.96 * np.std(second - first) / 20
    low, high = (float(number or 0) for number in (test.difference.low, test.difference.high))
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_weights_give_the_difference_of_ratios():
    """Bits per byte of all texts are the sum of bits over the sum of bytes."""
    num_bytes = np.array([10.0, 1000.0, 20.0])
    first, second = np.array([1.0, 2.0, 3.0]), np.array([1.5, 1.9, 2.0])
    test = compare_means(first, second, num_bytes)
    assert test.difference.value == pytest.approx((5 - 100 - 20) / 1030)
    assert test.name == "sign flips"


def test_statistics_that_are_no_means_are_compared_by_the_bootstrap():
    rng = np.random.default_rng(3)
    actual = rng.normal(size=300)
    near, far = actual + 0.5 * rng.normal(size=300), actual + 1.5 * rng.normal(size=300)
    correlate = lambda predicted: lambda i: float(np.corrcoef(predicted[i], actual[i])[0, 1])
    test = compare_statistics(correlate(far), correlate(near), 300)
    assert test.difference.value == pytest.approx(correlate(near)(np.arange(300)) - correlate(far)(np.arange(300)))
    assert test.difference.low is not None and test.difference.low > 0 and test.p_value < 0.01
    similar = compare_statistics(correlate(near), correlate(actual + 0.5 * rng.normal(size=300)), 300)
    assert similar.p_value > 0.05
