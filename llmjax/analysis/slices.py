"""Slices of a task: groups of examples on which the model errs more often than on the others."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools

import numpy as np
import scipy.stats

from llmjax.evals.paired import SIGNIFICANCE, holm, is_binary

MIN_SIZE = 10  # examples inside and outside of a slice
MAX_VALUES = 20  # of a field whose values are slices
_PARTS = 4  # of the examples by length and by rare words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Some examples against all others.

    field, value  what the examples have in common, such as "length" and "120 to 340 bytes"
    size          number of examples
    error         their mean error; rest: that of all other examples
    p_value       one-sided, of no larger error than outside; corrected: for all slices, by the method of Holm (1979)
    indices       of the examples
    """

    field: str
    value: str
    size: int
    error: float
    rest: float
    p_value: float
    corrected: float
    indices: Sequence[int]

    @property
    def is_significant(self) -> bool:
        """Whether the error is larger inside, after the correction."""
        return self.corrected < SIGNIFICANCE


def find_slices(errors: np.ndarray, masks: Mapping[tuple[str, str], np.ndarray]) -> list[Slice]:
    """All slices with their tests, the smallest p-value first.

    errors  float [examples]: 0 or 1, or a number that is larger the worse the answer is
    masks   (field, value) -> bool [examples]; those with fewer than MIN_SIZE examples inside or outside are left out
    Errors that are 0 or 1 take Fisher's exact test, others the test of Mann and Whitney.
    """
    chosen = {k: m for k, m in masks.items() if min(m.sum(), (~m).sum()) >= MIN_SIZE}
    test = _test_binary if is_binary(errors) else _test_ranks
    p_values = [test(errors[mask], errors[~mask]) for mask in chosen.values()]
    slices = [
        Slice(
            field=field,
            value=value,
            size=int(mask.sum()),
            error=float(errors[mask].mean()),
            rest=float(errors[~mask].mean()),
            p_value=p_value,
            corrected=corrected,
            indices=np.flatnonzero(mask).tolist(),
        )
        for ((field, value), mask), p_value, corrected in zip(chosen.items(), p_values, holm(p_values), strict=True)
    ]
    return sorted(slices, key=lambda each: each.p_value)


def _test_binary(inside: np.ndarray, outside: np.ndarray) -> float:
    table = [[part.sum(), len(part) - part.sum()] for part in (inside, outside)]
    _, p_value = scipy.stats.fisher_exact(table, alternative="greater")
    return float(p_value)  # pyright: ignore[reportArgumentType]


def _test_ranks(inside: np.ndarray, outside: np.ndarray) -> float:
    return float(scipy.stats.mannwhitneyu(inside, outside, alternative="greater", method="asymptotic").pvalue)


def make_masks(
    texts: Sequence[str], fields: Mapping[str, Sequence[str]], frequencies: Mapping[str, int] | None
) -> dict[tuple[str, str], np.ndarray]:
    """The candidates: quarters of the examples by length and by rare words, and the values of fields.

    fields       name -> the value of each example; a field with more than MAX_VALUES values is left out
    frequencies  word -> how often training texts contain it; None: as often as these texts do
    """
    from llmjax.analysis.vectors import make_analyzer

    analyze = make_analyzer()
    words = [analyze(text) for text in texts]
    lengths = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    masks = _split_by_size("length", lengths, lambda low, high: f"{low:,.0f} to {high:,.0f} bytes")
    masks |= _split_by_size(
        "rare words",
        _share_of_rare_words(words, frequencies),
        lambda low, high: f"{low:.0%} to {high:.0%} of the words",
    )
    for field, values in fields.items():
        names = sorted(set(values))
        if 1 < len(names) <= MAX_VALUES:
            column = np.array(values, object)
            masks |= {(field, name): column == name for name in names}
    return masks


def count_words(texts: Iterable[Sequence[str]]) -> Counter[str]:
    """How often each word occurs in texts that are lists of words."""
    return Counter(itertools.chain.from_iterable(texts))


def _share_of_rare_words(words: Sequence[Sequence[str]], frequencies: Mapping[str, int] | None) -> np.ndarray:
    """float [examples]: the share of words that are not among the most frequent ones, which make up 90% of the text."""
    if frequencies is None:
        frequencies = count_words(words)
    ordered = sorted(frequencies, key=frequencies.__getitem__, reverse=True)
    totals = np.cumsum([frequencies[word] for word in ordered])
    frequent = set(ordered[: int(np.searchsorted(totals, 0.9 * totals[-1])) + 1]) if ordered else set()
    return np.array([np.mean([word not in frequent for word in some]) if some else 0.0 for some in words])


def _split_by_size(
    field: str, sizes: np.ndarray, describe: Callable[[float, float], str]
) -> dict[tuple[str, str], np.ndarray]:
    """The quarters of the examples by a number, of which equal numbers share one."""
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, _PARTS + 1)[1:-1]))
    parts = np.searchsorted(edges, sizes, side="left")
    masks = {}
    for part in np.unique(parts):
        mask = parts == part
        masks[field, describe(sizes[mask].min(), sizes[mask].max())] = mask
    return masks if len(masks) > 1 else {}
