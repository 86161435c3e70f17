"""Paired tests of two models on the same examples, and the correction of their p-values for many tests."""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
import scipy.stats

from llmjax.evals.results import DRAWS, Estimate, estimate

SIGNIFICANCE = 0.05  # of the corrected p-values
_FLIPS = 9999
_SEED = 0
_CHUNK = 1 << 22  # signs that are drawn at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The second model against the first one.

    difference   mean of the second minus mean of the first, with its paired bootstrap 95% interval
    num_higher   examples where the number of the second is the higher one; 0 for a score that no single example has
    num_lower    examples where it is the lower one
    p_value      two-sided, of no difference
    name         that of the test
    """

    difference: Estimate
    num_higher: int
    num_lower: int
    p_value: float
    name: str


def compare_means(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> PairedTest:
    """Test whether the means of two models' numbers differ; float [examples], the same examples in the same order.

    Numbers that are all 0 or 1 take the exact test of McNemar, others random sign flips of their differences.
    weights   of the examples in the means, such as the bytes of a text for bits per byte; None: equal
    """
    differences = second - first
    shares = np.ones(len(differences)) if weights is None else weights
    # Both models' numbers of an example are drawn together.
    interval = estimate(lambda i: {"": float(shares[i] @ differences[i] / shares[i].sum())}, len(differences))[""]
    num_higher, num_lower = int((differences > 0).sum()), int((differences < 0).sum())
    if weights is None and is_binary(first) and is_binary(second):
        p_value, name = mcnemar(num_higher, num_lower), "exact McNemar"
    else:
        p_value, name = flip_signs(shares * differences), "sign flips"
    return PairedTest(difference=interval, num_higher=num_higher, num_lower=num_lower, p_value=p_value, name=name)


def compare_statistics(
    first: Callable[[np.ndarray], float], second: Callable[[np.ndarray], float], count: int
) -> PairedTest:
    """Test whether a statistic of `count` examples that is no mean, such as a correlation, differs between two models.

    first, second   indices of examples, of which some may repeat -> the statistic of these examples
    The p-value is the smallest level whose paired bootstrap interval leaves out 0 (Efron and Tibshirani, 1993, chapter
    15): twice the share of resamples on the other side of 0.
    """
    resampled: list[float] = []

    def find_difference(indices: np.ndarray) -> dict[str, float]:
        resampled.append(second(indices) - first(indices))
        return {"": resampled[-1]}

    interval = estimate(find_difference, count)[""]
    drawn = np.array(resampled[1:])  # the first one is that of all examples
    least = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * (1 + least) / (1 + DRAWS))
    return PairedTest(difference=interval, num_higher=0, num_lower=0, p_value=p_value, name="paired bootstrap")


def is_binary(values: np.ndarray) -> bool:
    """Whether all numbers are 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test (McNemar 1947): is one model right alone more often than the other?

    Of the examples that one model alone has right, each model has half under the null hypothesis, by a binomial law.
    """
    total = only_first + only_second
    return float(scipy.stats.binomtest(only_first, total, 0.5).pvalue) if total else 1.0


def flip_signs(differences: np.ndarray) -> float:
    """The p-value of the paired randomisation test of a sum (Fisher 1935), with random signs of the differences.

    Under the null hypothesis either model may have given either number of an example. scipy.stats.permutation_test
    does the same, but sorts for each flip, which takes ten times as long.
    """
    changed = differences[differences != 0].astype(np.float64)
    if not len(changed):
        return 1.0
    rng, total, reached = np.random.default_rng(_SEED), changed.sum(), 0
    least = abs(total) - 1e-12 * np.abs(changed).sum()  # sums of the same numbers in another order are equal
    size = max(1, _CHUNK // len(changed))
    for start in range(0, _FLIPS, size):
        is_flipped = rng.integers(0, 2, (min(size, _FLIPS - start), len(changed)), np.int8)
        reached += int((np.abs(total - 2 * (is_flipped @ changed)) >= least).sum())
    return (1 + reached) / (1 + _FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, in their order, corrected for all of them (Holm 1979).

    The smallest of n is multiplied by n, the next one by n - 1, and so on; none is below a smaller one's result.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
