"""Exact match and token F1 of values that the published definition of SQuAD gives."""

import pytest

from llmjax.evals.text_scores import exact_match, normalize_answer, token_f1


def test_normalisation_drops_case_punctuation_articles_and_white_space():
    assert normalize_answer("  The U.S.A., an  \tidea\nof A ") == "usa idea of"
    assert normalize_answer("theory another") == "theory another"  # articles are whole words
    assert normalize_answer("it's") == "its"


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in the city of Paris", ["Paris", "Paris, France"], 0, 2 / (4 + 1)),
        ("Denver Broncos", ["Denver Broncos", "Broncos"], 1, 1),
        ("a b b c", ["b b b"], 0, 2 * 2 / (3 + 3)),  # words count as often as both have them
        ("London", ["Paris"], 0, 0),
        ("", ["the"], 1, 1),  # both have no words
        ("", ["Paris"], 0, 0),
    ],
)
def test_golden_values(prediction, answers, match, f1):
    assert exact_match(prediction, answers) == match
    assert token_f1(prediction, answers) == pytest.approx(f1)
