"""Slices: Fisher's exact test and Holm's correction against SciPy and by hand, and planted slices that are found."""

import numpy as np
import pytest
import scipy.stats

from llmjax.analysis.slices import MIN_SIZE, find_slices, make_masks


def test_p_values_are_those_of_scipy_and_are_corrected():
    errors = np.array([1.0] * 12 + [0.0] * 8 + [1.0] * 10 + [0.0] * 30)
    first = np.arange(60) < 20
    second = np.arange(60) % 2 == 0
    slices = find_slices(errors, {("source", "a"): first, ("parity", "even"): second})
    worst, other = slices
    assert (worst.field, worst.value, worst.size) == ("source", "a", 20)
    assert (worst.error, worst.rest) == pytest.approx((0.6, 0.25))
    assert worst.p_value == pytest.approx(scipy.stats.hypergeom.sf(11, 60, 22, 20))
    assert worst.corrected == pytest.approx(2 * worst.p_value) and worst.is_significant
    assert other.corrected == pytest.approx(max(worst.corrected, other.p_value)) and not other.is_significant


def test_numbers_take_the_test_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=100)
    mask = np.arange(100) < 30
    losses[mask] += 1
    (found,) = find_slices(losses, {("source", "a"): mask})
    assert found.p_value == pytest.approx(
        scipy.stats.mannwhitneyu(losses[mask], losses[~mask], alternative="greater").pvalue, rel=1e-6
    )
    assert found.is_significant


def test_a_slice_on_which_the_model_is_better_is_not_significant():
    errors = np.array([0.0] * 30 + [1.0] * 30)
    (found,) = find_slices(errors, {("source", "a"): np.arange(60) < 30})
    assert found.p_value == 1.0 and not found.is_significant


def test_small_slices_are_left_out():
    errors = np.ones(40)
    assert find_slices(errors, {("source", "a"): np.arange(40) < MIN_SIZE - 1}) == []
    assert find_slices(errors, {("source", "a"): np.arange(40) >= MIN_SIZE - 1}) == []


def test_false_alarms_are_rare():
    """Errors that depend on nothing: at most 5% of the sets of slices have a significant one, within chance."""
    rng = np.random.default_rng(0)
    masks = {("source", str(k)): rng.random(200) < 0.3 for k in range(12)}
    alarms = sum(
        any(each.is_significant for each in find_slices((rng.random(200) < 0.2).astype(float), masks))
        for _ in range(60)
    )
    assert alarms <= 8


def test_masks_by_length_fields_and_rare_words():
    texts = ["good film"] * 20 + ["a zygote quixotic film of considerable length"] * 20
    fields = {"source": ["a", "b"] * 20, "id": [str(number) for number in range(40)], "same": ["x"] * 40}
    masks = make_masks(texts, fields, {"good": 500, "film": 400, "a": 300, "of": 200, "length": 50})
    assert {field for field, _ in masks} == {"length", "rare words", "source"}
    np.testing.assert_array_equal(masks["source", "a"], np.arange(40) % 2 == 0)
    np.testing.assert_array_equal(masks["length", "45 to 45 bytes"], np.arange(40) >= 20)
    # Frequent are the words that make up 90% of the training text: good, film, a and of.
    np.testing.assert_array_equal(masks["rare words", "57% to 57% of the words"], np.arange(40) >= 20)
