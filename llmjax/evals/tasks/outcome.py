"""What a task yields: a line for each example, and scores as functions of the examples, so that these are resampled."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one task.

    lines    one for each example, in the order of the file: JSON objects with index, input, target and prediction
    score    (indices of examples, one of them as often as it counts) -> scores by name, the same names in each call;
             nan where a score is undefined for these examples
    main     the name of the main score
    details  what else the result file holds, such as a confusion matrix
    plot     an SVG of the outcome; "": none
    num_cut  texts that were cut to fit a row
    """

    lines: list[dict[str, Any]]
    score: Callable[[np.ndarray], Scores]
    main: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plot: str = ""
    num_cut: int = 0


class Groups:
    """The examples of each group, by the values of a field; none without a field."""

    def __init__(self, values: Sequence[str] | None):
        self.names: list[str] = sorted(set(values or ()))
        self._numbers = np.array([self.names.index(value) for value in values or ()], np.int64)

    def counts(self) -> dict[str, int]:
        """The number of examples of each group."""
        return dict(zip(self.names, np.bincount(self._numbers, minlength=len(self.names)).tolist(), strict=True))

    def split(self, indices: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """(name, those of the indices that are of the group) of each group."""
        if not self.names:
            return []
        numbers = self._numbers[indices]
        return [(name, indices[numbers == number]) for number, name in enumerate(self.names)]

    def means(self, numerators: np.ndarray, denominators: np.ndarray, indices: np.ndarray) -> list[tuple[str, float]]:
        """(name, sum of numerators / sum of denominators) of each group; nan where the divisor is 0."""
        if not self.names:
            return []
        numbers, count = self._numbers[indices], len(self.names)
        above = np.bincount(numbers, numerators[indices], count)
        below = np.bincount(numbers, denominators[indices], count)
        ratios = np.divide(above, below, out=np.full(count, np.nan), where=below > 0)
        return list(zip(self.names, ratios.tolist(), strict=True))


def score_means(columns: Mapping[str, np.ndarray], main: str, groups: Groups) -> Callable[[np.ndarray], Scores]:
    """The `score` of an Outcome whose scores are means: of each column, and of the main one for each group.

    columns   float [examples] by name
    """
    ones = np.ones(len(columns[main]))

    def score(indices: np.ndarray) -> Scores:
        scores = {name: float(column[indices].mean()) for name, column in columns.items()}
        return scores | {f"{main}/{name}": mean for name, mean in groups.means(columns[main], ones, indices)}

    return score
