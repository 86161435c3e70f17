"""Do two samples of texts come from one distribution? Three tests, corrected together."""

from collections.abc import Sequence
import dataclasses

import numpy as np
import scipy.stats

from llmjax.analysis.vectors import WORD_PATTERN, compute_tfidf
from llmjax.evals.paired import holm

LEVEL = 0.01  # of the family of tests: the chance of an alarm where there is no mismatch
PERMUTATIONS = 999  # three times the smallest p-value, 1/1000, is below LEVEL
MAX_TEXTS = 1000  # of each sample
MIN_TEXTS = 20
_MAX_WORDS = 5000
_SHOWN_WORDS = 10
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MismatchTest:
    """One test: what it measures, and the p-value of no difference, corrected by the method of Holm (1979)."""

    name: str
    measure: str
    value: float
    p_value: float
    corrected: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The tests of two samples.

    counts        texts of each sample that were compared
    first_words   words that are more frequent in the first sample, by G-test; second_words: in the second
    """

    tests: Sequence[MismatchTest]
    counts: tuple[int, int]
    first_words: Sequence[str]
    second_words: Sequence[str]

    @property
    def is_alarm(self) -> bool:
        """Whether a corrected p-value is at most LEVEL."""
        return any(test.corrected <= LEVEL for test in self.tests)


def compare_samples(
    first: Sequence[str], second: Sequence[str], vectors: np.ndarray | None = None, *, seed: int = _SEED
) -> Mismatch:
    """Compare two samples of at least MIN_TEXTS texts each, of at most MAX_TEXTS (`draw_sample` draws them).

    vectors  float [texts of both samples, dimensions] for the first two tests, of a model that has not learned from
             these texts; None: TF-IDF
    """
    texts, is_second = [*first, *second], np.repeat([False, True], [len(first), len(second)])
    rng = np.random.default_rng(seed)
    features = compute_tfidf(texts) if vectors is None else vectors
    counts, words = count_words(texts)
    flips = np.stack([rng.permutation(is_second) for _ in range(PERMUTATIONS)])
    measured = [
        ("classifier two-sample test", "ROC AUC", *classify_samples(features, is_second, rng)),
        ("maximum mean discrepancy", "MMD squared", *compare_means_of_kernels(features, is_second, flips)),
        ("vocabulary divergence", "bits", *compare_vocabularies(counts, is_second, flips)),
    ]
    corrected = holm([p_value for *_, p_value in measured])
    tests = [
        MismatchTest(name=name, measure=measure, value=value, p_value=p_value, corrected=after)
        for (name, measure, value, p_value), after in zip(measured, corrected, strict=True)
    ]
    first_words, second_words = _find_typical_words(counts, words, is_second)
    return Mismatch(tests=tests, counts=(len(first), len(second)), first_words=first_words, second_words=second_words)


def draw_sample(texts: Sequence[str], size: int = MAX_TEXTS, *, seed: int = _SEED) -> list[str]:
    """At most `size` of the texts, drawn at random, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(texts))[:size]
    return [texts[int(index)] for index in np.sort(chosen)]


def classify_samples(features, is_second: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(ROC AUC, p-value) of the classifier two-sample test (Lopez-Paz and Oquab, 2017, arXiv:1610.06545).

    Logistic regression learns the sample of a text from one half of the texts. On the other half, the test of Mann and
    Whitney asks whether the scores of the second sample are higher.
    """
    from sklearn.linear_model import LogisticRegression

    half = np.zeros(len(is_second), bool)
    for value in (False, True):
        members = rng.permutation(np.flatnonzero(is_second == value))
        half[members[: len(members) // 2]] = True
    model = LogisticRegression(max_iter=1000).fit(features[np.flatnonzero(half)], is_second[half])
    scores = model.decision_function(features[np.flatnonzero(~half)])
    higher, lower = scores[is_second[~half]], scores[~is_second[~half]]
    test = scipy.stats.mannwhitneyu(higher, lower, alternative="greater", method="asymptotic")
    return float(test.statistic / (len(higher) * len(lower))), float(test.pvalue)


def compare_means_of_kernels(vectors, is_second: np.ndarray, flips: np.ndarray) -> tuple[float, float]:
    """(unbiased MMD squared, permutation p-value) with a Gaussian kernel (Gretton et al., 2012, JMLR 13, equation 3).

    vectors  float [texts, dimensions], an array or a sparse matrix; the kernel's width is the median distance
    flips    bool [permutations, texts]: `is_second` in other orders
    """
    products = vectors @ vectors.T
    products = products if isinstance(products, np.ndarray) else products.toarray()
    squares = products.diagonal()
    distances = np.maximum(squares[:, None] + squares - 2 * products, 0.0)
    median = np.median(distances[np.triu_indices(len(distances), 1)])
    kernel = np.exp(-distances / (median or 1.0)).astype(np.float32)
    np.fill_diagonal(kernel, 0.0)

    def measure(rows: np.ndarray) -> np.ndarray:
        second = rows.astype(np.float32)
        inside = second @ kernel
        number = rows.sum(axis=1).astype(np.float64)
        other = rows.shape[1] - number
        within = (inside * second).sum(axis=1, dtype=np.float64)
        across = (inside * (1 - second)).sum(axis=1, dtype=np.float64)
        rest = kernel.sum(dtype=np.float64) - within - 2 * across
        return within / (number * (number - 1)) + rest / (other * (other - 1)) - 2 * across / (number * other)

    return _permute(measure, is_second, flips)


def count_words(texts: Sequence[str]):
    """(counts, a sparse matrix int64 [texts, words], the words): the most frequent ones, up to _MAX_WORDS."""
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=WORD_PATTERN, max_features=_MAX_WORDS)
    try:
        counts = sparse.csr_matrix(vectorizer.fit_transform(texts))
    except ValueError:  # texts without words
        return sparse.csr_matrix((len(texts), 1), dtype=np.int64), [""]
    return counts, vectorizer.get_feature_names_out().tolist()


def compare_vocabularies(counts, is_second: np.ndarray, flips: np.ndarray) -> tuple[float, float]:
    """(Jensen-Shannon divergence in bits of the words of both samples, permutation p-value); see Lin, 1991.

    Whole texts are permuted, since the words of one text depend on each other.
    """
    total = np.asarray(counts.sum(axis=0), np.float64).ravel()

    def measure(rows: np.ndarray) -> np.ndarray:
        second = np.asarray((counts.T @ rows.T.astype(np.float64)).T)
        return jensen_shannon(total - second, second)

    return _permute(measure, is_second, flips)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The divergence in bits of two distributions, given by counts float [..., words]; 0 of samples without words."""
    p, q = (counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1) for counts in (first, second))
    middle = np.maximum((p + q) / 2, 1e-300)
    entropy = lambda x: np.where(x > 0, x * np.log2(np.maximum(x, 1e-300) / middle), 0.0).sum(axis=-1)
    return (entropy(p) + entropy(q)) / 2


def _permute(measure, is_second: np.ndarray, flips: np.ndarray) -> tuple[float, float]:
    """(value, p-value): the share of orders with at least this value, the given one among them."""
    value = float(measure(is_second[None])[0])
    reached = sum(int((measure(part) >= value - 1e-12).sum()) for part in np.array_split(flips, 10))
    return value, (1 + reached) / (1 + len(flips))


def _find_typical_words(counts, words: Sequence[str], is_second: np.ndarray) -> tuple[list[str], list[str]]:
    """The words whose frequency differs most between the samples, by the G statistic (Dunning, 1993)."""
    second = np.asarray(counts[np.flatnonzero(is_second)].sum(axis=0), np.float64).ravel()
    first = np.asarray(counts[np.flatnonzero(~is_second)].sum(axis=0), np.float64).ravel()
    if not first.sum() or not second.sum():
        return [], []
    share = first.sum() / (first.sum() + second.sum())
    terms = []
    for observed, part in ((first, share), (second, 1 - share)):
        expected = np.maximum((first + second) * part, 1e-12)
        terms.append(np.where(observed > 0, observed * np.log(np.maximum(observed, 1e-12) / expected), 0.0))
    order = np.argsort(-2 * (terms[0] + terms[1]), kind="stable")
    is_first = first > (first + second) * share
    return (
        [words[int(i)] for i in order if is_first[i]][:_SHOWN_WORDS],
        [words[int(i)] for i in order if not is_first[i]][:_SHOWN_WORDS],
    )
