"""Gaps between groups, by hand."""

import numpy as np
import pytest
from sklearn import metrics as sklearn

from llmjax.evals import results
from llmjax.evals.tasks.classify import score_groups
from llmjax.evals.tasks.outcome import Groups

LABELS = np.array([0, 0, 1, 1, 0, 1, 2, 2])
PREDICTED = np.array([0, 1, 1, 1, 1, 0, 2, 2])
GROUPS = ["a", "a", "a", "a", "b", "b", "c", "c"]


def score(indices) -> dict[str, float]:
    return score_groups(Groups(GROUPS), LABELS, PREDICTED, 3, np.array(indices))


def test_gaps_of_groups():
    scores = score(range(8))
    assert [scores[f"accuracy/{group}"] for group in "abc"] == [0.75, 0, 1]
    assert (scores["accuracy_worst_group"], scores["accuracy_gap"]) == (0, 1)
    expected = [
        sklearn.f1_score(LABELS[part], PREDICTED[part], average="macro") for part in map(slice, (0, 4, 6), (4, 6, 8))
    ]
    assert [scores[f"f1_macro/{group}"] for group in "abc"] == pytest.approx(expected)
    assert scores["f1_macro/a"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["f1_macro_gap"] == pytest.approx(1)


def test_a_group_without_examples_takes_no_part():
    scores = score([0, 1, 6])
    assert np.isnan(scores["accuracy/b"]) and scores["accuracy_gap"] == 0.5
    assert score([4])["accuracy_gap"] == 0


def test_a_gap_has_an_interval():
    estimates = results.estimate(lambda indices: score(indices), 8)
    assert estimates["accuracy_gap"].value == 1 and 0 < estimates["accuracy_gap"].low < 1


def test_without_groups_there_are_no_gaps():
    assert score_groups(Groups(None), LABELS, PREDICTED, 3, np.arange(8)) == {}
