"""Scores of generated texts: exact match and token F1 as SQuAD defines them, BLEU, chrF and ROUGE."""

from collections import Counter
from collections.abc import Callable, Sequence
import importlib
import re
import string
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.evals.classification import check_lengths

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


class CorpusScores:
    """BLEU or chrF of sacrebleu (Post 2018, arXiv:1804.08771), with its default settings, on its scale of 0 to 100.

    BLEU is that of Papineni et al. 2002, chrF that of Popović 2015. Both add up counts of all texts: the score of some
    texts is that of `corpus_score`, not a mean.
    """

    def __init__(self, name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]):
        """name: "bleu" or "chrf"; references: one or more of each prediction.

        Raises UserError without sacrebleu, where the lengths differ, and for a prediction without a reference.
        """
        metrics = import_library("sacrebleu", "sacrebleu.metrics", name)
        check_references(predictions, references)
        # The counts of each text, which sacrebleu adds up itself for its bootstrap intervals.
        self._metric = metrics.BLEU() if name == "bleu" else metrics.CHRF()
        width = max(map(len, references))
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(width)]
        self._counts = np.array(self._metric._extract_corpus_statistics(list(predictions), streams))
        one = metrics.BLEU(effective_order=True) if name == "bleu" else self._metric
        pairs = zip(predictions, references, strict=True)
        self.of_texts = [float(one.sentence_score(text, list(right)).score) for text, right in pairs]
        self.signature = str(self._metric.get_signature())

    def score(self, indices: np.ndarray) -> float:
        """The score of these texts together, each as often as its index is there."""
        return float(self._metric._compute_score_from_stats(self._counts[indices].sum(axis=0).tolist()).score)


def make_rouge(names: Sequence[str]) -> Callable[[str, Sequence[str]], dict[str, float]]:
    """(text, references) -> the F1 by name, of 0 to 1, of the reference with the highest one.

    ROUGE (Lin 2004) as Google's rouge-score computes it, with Porter's stemmer. Raises UserError without that library.
    names   "rouge1", "rouge2", "rougeL"
    """
    scorer = import_library("rouge-score", "rouge_score.rouge_scorer", names[0]).RougeScorer(
        list(names), use_stemmer=True
    )

    def score(text: str, references: Sequence[str]) -> dict[str, float]:
        return {name: float(each.fmeasure) for name, each in scorer.score_multi(list(references), text).items()}

    return score


def check_references(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise UserError where these are not one for one, and for a prediction without a reference that has text."""
    check_lengths(list(predictions), list(references))
    for number, texts in enumerate(references):
        if not any(text.strip() for text in texts):
            raise UserError(f"prediction {number} has no reference with text; add one")


def import_library(package: str, module: str, metric: str) -> Any:
    """A module of the extra `eval`. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"metrics={metric!r}: needs {package} ({error}); run `pip install 'llmjax[eval]'`") from None
