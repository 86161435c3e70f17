"""Scores of generated texts against reference answers: exact match and token F1, as the SQuAD data set defines them."""

from collections import Counter
from collections.abc import Sequence
import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation, English articles and repeated white space.

    Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction is one of the normalised answers, else 0.0."""
    return float(normalize_answer(prediction) in map(normalize_answer, answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The highest F1 of the prediction's words with those of an answer, both normalised.

    A text without words equals another one without words alone, as in SQuAD 2.0.
    """
    return max(_word_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers)


def _word_f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))
