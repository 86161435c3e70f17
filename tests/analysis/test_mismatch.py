"""Mismatch: divergences against SciPy, MMD by hand, and samples of one and of two distributions."""

import numpy as np
import pytest
from scipy.spatial import distance

from llmjax.analysis import mismatch

RNG = np.random.default_rng(0)
WORDS = np.array([f"word{number}" for number in range(60)])


def make_texts(count: int, shift: float, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    weights = np.exp(-np.arange(60) / 20 + shift * np.linspace(-1, 1, 60))
    return [" ".join(rng.choice(WORDS, 12, p=weights / weights.sum())) for _ in range(count)]


def test_jensen_shannon_is_that_of_scipy():
    first, second = RNG.integers(0, 9, (2, 30)).astype(float)
    expected = distance.jensenshannon(first, second, base=2) ** 2
    assert mismatch.jensen_shannon(first, second) == pytest.approx(expected)
    assert mismatch.jensen_shannon(first, first) == 0
    assert mismatch.jensen_shannon(np.array([1.0, 0]), np.array([0.0, 1])) == 1


def test_mmd_by_the_sums_of_its_definition():
    vectors = RNG.normal(size=(9, 3))
    is_second = np.arange(9) >= 4
    flips = np.stack([RNG.permutation(is_second) for _ in range(50)])
    value, p_value = mismatch.compare_means_of_kernels(vectors, is_second, flips)
    distances = distance.squareform(distance.pdist(vectors, "sqeuclidean"))
    kernel = np.exp(-distances / np.median(distance.pdist(vectors, "sqeuclidean")))
    x, y = kernel[:4, :4], kernel[4:, 4:]
    expected = (x.sum() - 4) / 12 + (y.sum() - 5) / 20 - 2 * kernel[:4, 4:].mean()
    assert value == pytest.approx(expected, abs=1e-6)
    assert 1 / 51 <= p_value <= 1


def test_one_distribution_raises_no_alarm_and_two_do():
    one, same, other = make_texts(120, 0, 1), make_texts(120, 0, 2), make_texts(120, 0.6, 3)
    assert not mismatch.compare_samples(one, same).is_alarm
    result = mismatch.compare_samples(one, other)
    assert result.is_alarm and result.counts == (120, 120)
    assert all(test.corrected >= test.p_value for test in result.tests)
    # The shift makes the first words rarer and the last ones more frequent.
    assert {int(word[4:]) < 30 for word in result.first_words[:3]} == {True}
    assert {int(word[4:]) >= 20 for word in result.second_words[:3]} == {True}


def test_the_level_of_all_tests_can_be_reached():
    """Three tests: the smallest possible p-value of a permutation test, times three, is below the level."""
    assert 3 / (1 + mismatch.PERMUTATIONS) <= mismatch.LEVEL


def test_texts_without_words_do_not_differ():
    result = mismatch.compare_samples([""] * 25, [""] * 25)
    assert not result.is_alarm and result.first_words == []


def test_a_sample_is_drawn_in_order():
    texts = [str(number) for number in range(50)]
    drawn = mismatch.draw_sample(texts, 20)
    assert len(set(drawn)) == 20 and drawn == sorted(drawn, key=int)
    assert mismatch.draw_sample(texts, 80) == texts
