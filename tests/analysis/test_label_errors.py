"""Confident learning: hand-computed joints, and planted errors that are found."""

import numpy as np
import pytest

from llmjax.analysis.label_errors import (
    count_confident,
    estimate_errors,
    find_label_errors,
    predict_out_of_fold,
)

LABELS = np.array([0, 0, 0, 0, 1, 1])
FIRST = np.array([0.9, 0.8, 0.6, 0.1, 0.2, 0.6])
PROBABILITIES = np.stack([FIRST, 1 - FIRST], axis=1)


def test_the_confident_joint_by_hand():
    """Thresholds: (0.9 + 0.8 + 0.6 + 0.1) / 4 = 0.6 and (0.8 + 0.4) / 2 = 0.6. Example 3 is confidently of class 1, and
    example 5, with 0.6, of class 0."""
    np.testing.assert_array_equal(count_confident(LABELS, PROBABILITIES), [[3, 1], [1, 1]])
    np.testing.assert_allclose(estimate_errors(LABELS, PROBABILITIES), [[3, 1], [1, 1]])


def test_examples_below_every_threshold_are_not_counted():
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8], [0.1, 0.9]])
    labels = np.array([0, 0, 0, 1, 1])
    # Thresholds 0.7 and 0.85: examples 2 and 3 reach none. Rows are scaled to the counts of the labels.
    np.testing.assert_array_equal(count_confident(labels, probabilities), [[2, 0], [0, 1]])
    np.testing.assert_allclose(estimate_errors(labels, probabilities), [[3, 0], [0, 2]])


def test_label_errors_by_hand():
    errors = find_label_errors(LABELS, PROBABILITIES, ("bad", "good"))
    assert [(error.index, error.given, error.suggested) for error in errors] == [(3, "bad", "good"), (5, "good", "bad")]
    assert [error.score for error in errors] == pytest.approx([0.8, 0.2])


def test_the_likeliest_error_is_first_and_a_class_keeps_an_example():
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.1, 0.9], [0.05, 0.95], [0.2, 0.8]])
    errors = find_label_errors(labels, probabilities, ("a", "b"))
    assert errors[0].index == 2 and 0 not in {error.index for error in errors}


def test_planted_errors_are_found_out_of_fold():
    """Two clusters that are easy to separate: nearly all of 10% flipped labels are found, and little else."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 2, 400)
    vectors = rng.normal(size=(400, 8)) + 2.0 * true[:, None]
    flipped = rng.permutation(400)[:40]
    given = true.copy()
    given[flipped] = 1 - given[flipped]
    probabilities = predict_out_of_fold(vectors, given)
    assert probabilities is not None and probabilities.shape == (400, 2)
    found = [error.index for error in find_label_errors(given, probabilities, ("a", "b"))]
    hits = np.isin(found, flipped)
    assert hits.mean() >= 0.9 and hits.sum() >= 36 and hits[:20].all()


def test_no_probabilities_of_a_class_with_fewer_examples_than_folds():
    labels = np.array([0] * 20 + [1] * 4)
    assert predict_out_of_fold(np.arange(24.0)[:, None], labels) is None
