"""Vectors of texts by TF-IDF, for models that need no checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

from llmjax.errors import UserError

WORD_PATTERN = r"(?u)\w+|[^\w\s]"  # runs of letters, digits and underscores, and single other signs
_MAX_FEATURES = 50_000


def require_sklearn() -> None:
    """Raise UserError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("error analysis needs scikit-learn: run `pip install 'llmjax[analysis]'`") from None


def make_analyzer() -> Callable[[str], list[str]]:
    """The function that splits a text into lowercased words, as WORD_PATTERN says."""
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(token_pattern=WORD_PATTERN).build_analyzer()


def compute_tfidf(texts: Sequence[str]) -> Any:
    """TF-IDF of words and pairs of words, a sparse matrix float64 [texts, features] with rows of length 1."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        token_pattern=WORD_PATTERN, ngram_range=(1, 2), sublinear_tf=True, max_features=_MAX_FEATURES
    )
    try:
        return vectorizer.fit_transform(texts)
    except ValueError:  # texts without words
        return sparse.csr_matrix((len(texts), 1))
