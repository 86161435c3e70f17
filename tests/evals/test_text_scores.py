"""Exact match and token F1 of values that the published definition of SQuAD gives; BLEU, chrF and ROUGE as direct calls
of their libraries compute them."""

import sys

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
import sacrebleu

from llmjax.errors import UserError
from llmjax.evals.text_scores import CorpusScores, exact_match, make_rouge, normalize_answer, token_f1

TEXTS = [
    "the cat sat on the mat",
    "a dog barked loudly",
    "",
    "It is raining in Berlin.",
    "on the mat, the cat sat down",
]
REFERENCES = [
    ["the cat is on the mat", "a cat sat there"],
    ["the dog barked"],
    ["silence"],
    ["It rains."],
    ["the cat sat"],
]


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


@pytest.mark.parametrize(("name", "metric"), [("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())])
def test_scores_of_a_corpus_equal_those_of_sacrebleu(name, metric):
    scores = CorpusScores(name, TEXTS, REFERENCES)
    for indices in (np.arange(5), np.array([1, 1, 4, 0, 0]), np.array([3])):
        streams = [[[*REFERENCES[i], None][stream] for i in indices] for stream in range(2)]
        expected = metric.corpus_score([TEXTS[i] for i in indices], streams).score
        assert scores.score(indices) == pytest.approx(expected, abs=1e-9)
    sentence = sacrebleu.sentence_bleu if name == "bleu" else sacrebleu.sentence_chrf
    expected = [sentence(text, right).score for text, right in zip(TEXTS, REFERENCES, strict=True)]
    assert scores.of_texts == pytest.approx(expected)
    assert "version:" in scores.signature


def test_rouge_is_that_of_the_best_reference():
    names = ["rouge1", "rouge2", "rougeL"]
    score, scorer = make_rouge(names), RougeScorer(names, use_stemmer=True)
    for text, references in zip(TEXTS, REFERENCES, strict=True):
        each = [scorer.score(reference, text) for reference in references]
        expected = {name: max(found[name].fmeasure for found in each) for name in names}
        assert score(text, references) == pytest.approx(expected)
    assert score("the cat sat", ["the cats sat there"])["rouge1"] == pytest.approx(2 * 3 / 7)


def test_references_that_do_not_fit():
    with pytest.raises(UserError, match="5 predictions for 4 references: give one prediction for each"):
        CorpusScores("bleu", TEXTS, REFERENCES[:4])
    with pytest.raises(UserError, match="prediction 1 has no reference with text; add one"):
        CorpusScores("chrf", TEXTS[:2], [["a"], [" "]])


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"metrics='bleu': needs sacrebleu .*; run `pip install 'llmjax\[eval\]'`"):
        CorpusScores("bleu", TEXTS, REFERENCES)
    with pytest.raises(UserError, match=r"metrics='rougeL': needs rouge-score"):
        make_rouge(["rougeL"])
