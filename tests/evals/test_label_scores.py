"""Scores of labels equal those of scikit-learn and SciPy, or of a few lines by hand."""

import numpy as np
import pytest
import scipy.stats

from llmjax.evals.label_scores import baseline_accuracy, macro_f1, pearson, root_mean_square_error, spearman

# From scikit-learn 1.9: f1_score(actual, predicted, average="macro", zero_division=0)
ACTUAL, PREDICTED, MACRO_F1 = [0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 0, 2, 2], 0.4583333333333333


def test_macro_f1_counts_a_class_that_is_never_right_as_0():
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (ACTUAL, PREDICTED), 1)
    assert macro_f1(confusion) == pytest.approx(MACRO_F1, abs=1e-12)
    assert baseline_accuracy(confusion) == pytest.approx(3 / 7)


def test_classes_that_are_decided_one_by_one():
    # class 0: of 3 documents that have it, 2 are found, and 1 other is taken for it; class 1: never there, never taken
    confusion = np.array([[[4, 1], [1, 2]], [[8, 0], [0, 0]]])
    assert macro_f1(confusion) == pytest.approx((2 * 2 / (3 + 3) + 0) / 2)
    assert baseline_accuracy(confusion) == pytest.approx((5 / 8 + 1) / 2)


def test_correlations_equal_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 50) / 2, rng.normal(size=50)
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert pearson(x, np.ones(50)) == 0.0


def test_root_mean_square_error():
    assert root_mean_square_error(np.array([1, 2, 3]), np.array([1, 4, 7])) == pytest.approx(np.sqrt(20 / 3))
