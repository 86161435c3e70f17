"""Entities, n-grams and thresholds by hand; accuracies as scikit-learn computes them."""

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn

from llmjax.errors import UserError
from llmjax.evals import classification, consistency
from llmjax.evals.consistency import count_novel_ngrams, find_entities, find_threshold, find_unsupported

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        ("Visitors met Anna Smith\u2019s dog.", ["names anna", "names smith"]),  # the first word may be any word
        ("It rained. Berlin flooded! \u201cParis\u201d did not.", []),
        ("I think Mr Jones and I'm right", ["names jones"]),
        ("for 1,000.50 on the 21st, in the 1990s", ["numbers 1000.5", "numbers 21", "numbers 1990"]),
        ("two of one hundred in 3D, 2.5m", ["numbers 2", "numbers 2.5"]),
        ("on monday, in MAY or may", ["dates monday", "names may"]),
        ("", []),
    ],
)
def test_entities(text, entities):
    assert [f"{entity.kind} {entity.key}" for entity in find_entities(text)] == entities


def test_entities_that_the_source_lacks():
    text = "She met Anna Smith's two dogs on Monday in 1999, 1,000 km away."
    lacking = find_unsupported(text, "ANNA had 2 dogs. 1000 km in 1998, on Tuesday. monday")
    assert lacking == {"names": (["Smith's"], 2), "numbers": (["1999"], 3), "dates": ([], 1)}


def test_novel_ngrams():
    assert count_novel_ngrams("A, b c d!", "a b c e") == (1, 2)
    assert count_novel_ngrams("b a", "a b") == (1, 1)  # fewer words than three
    assert count_novel_ngrams("", "a") == (0, 0)


def test_surprise_is_that_of_unigrams_with_the_text_itself():
    # Counts: a 1 + 2, b 1, c 1; of 5 words.
    expected = (math.log(5 / 3) + math.log(5)) / 2
    assert consistency.unigram_surprise("A b", ["a a", "c"]) == pytest.approx(expected)
    assert consistency.unigram_surprise("a a", ["a"] * 3) == 0
    assert consistency.unigram_surprise("", ["a"]) == 0


def test_balanced_accuracy_equals_that_of_scikit_learn():
    actual, predicted = RNG.random((2, 200)) < [[0.2], [0.4]]
    expected = sklearn.balanced_accuracy_score(actual, predicted)
    assert consistency.balanced_accuracy(actual, predicted) == pytest.approx(expected)
    assert math.isnan(consistency.balanced_accuracy(actual | True, predicted))
    with pytest.raises(UserError, match="3 predictions for 2 references"):
        consistency.balanced_accuracy(actual[:2], predicted[:3])


def test_the_threshold_has_the_highest_balanced_accuracy():
    actual, scores = RNG.random(60) < 0.3, RNG.integers(0, 12, 60).astype(float)
    best = max(sklearn.balanced_accuracy_score(actual, scores > limit) for limit in np.arange(-1, 13) + 0.5)
    threshold = find_threshold(actual, scores)
    assert sklearn.balanced_accuracy_score(actual, scores > threshold) == pytest.approx(best)
    assert find_threshold(np.array([False, False, True]), np.array([1.0, 2.0, 4.0])) == 3
    assert find_threshold(np.array([True, False]), np.array([1.0, 1.0])) == -math.inf


def test_no_example_is_predicted_by_a_threshold_that_it_decided():
    actual, scores = np.arange(41) % 2 == 0, RNG.normal(size=41)
    halves = classification.split_halves(actual)
    assert [halves[actual].sum(), halves[~actual].sum()] == [10, 10]  # of 21 and 20
    predicted = consistency.predict_crosswise(actual, scores)
    for number in range(41):
        other = halves != halves[number]
        assert predicted[number] == (scores[number] > find_threshold(actual[other], scores[other]))
