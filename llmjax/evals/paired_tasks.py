"""Two runs on one task: pair their examples, test the main score, and list the examples where one run is better."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any

from etils import epath
import numpy as np

from llmjax.binding import differences
from llmjax.evals import results
from llmjax.evals.label_scores import pearson, spearman
from llmjax.evals.paired import SIGNIFICANCE, PairedTest, compare_means, compare_statistics, holm, is_binary
from llmjax.evals.results import Line

MAX_EXAMPLES = 5  # that are listed of each run
_CORRELATIONS = {"pearson": pearson, "spearman": spearman, "cosine_pearson": pearson, "cosine_spearman": spearman}
_IDENTITY = ("index", "input", "document", "target")  # of an example, those that it has
_TOLERANCE = 1e-6  # relative, between a mean over examples and the score of the task


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """A task that a run was scored on: the content of eval/<step>/<task>.json, and the path of that file."""

    run: str
    record: Mapping[str, Any]
    path: epath.Path

    @property
    def main(self) -> str:
        """The name of the main score."""
        return results.find_main(self.record)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """An example on which two runs differ: what they read, its target, and by run the prediction and the score."""

    index: Any
    text: str
    target: str
    predictions: tuple[str, str]
    scores: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs on one task.

    runs         names of the first run and of the second, which is compared with it
    metric       the main score; is_binary: of each example 0 or 1
    test         None where there is none, for the `reason`
    corrected    the p-value, corrected for all tests of the comparison
    first_only   examples where the first run is better, MAX_EXAMPLES at most; second_only: the second. Those of scores
                 that are 0 or 1 are in the order of the task, others begin with the largest difference
                 a correlation has none, since no single example has such a score
    num_first    the number of all examples where the first run is better; num_second: the second; num_equal: neither
    note         settings of the task in which the runs differ
    """

    task: str
    runs: tuple[str, str]
    metric: str
    test: PairedTest | None = None
    reason: str = ""
    corrected: float | None = None
    is_binary: bool = False
    first_only: Sequence[Difference] = ()
    second_only: Sequence[Difference] = ()
    num_first: int = 0
    num_second: int = 0
    num_equal: int = 0
    note: str = ""

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant after the correction."""
        return self.corrected is not None and self.corrected < SIGNIFICANCE


def correct(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with p-values that are corrected for all of their tests, by the method of Holm."""
    corrected = iter(holm([pair.test.p_value for pair in pairs if pair.test is not None]))
    return [pair if pair.test is None else dataclasses.replace(pair, corrected=next(corrected)) for pair in pairs]


def pair(task: str, first: TaskFiles, second: TaskFiles) -> Pair:
    """Compare two runs on a task. Raises UserError for a damaged file of examples."""
    runs, metric = (first.run, second.run), first.main
    untested = Pair(task=task, runs=runs, metric=metric)
    if second.main != metric:
        reason = f"{first.run} has the main score {metric}, {second.run} has {second.main}"
        return dataclasses.replace(untested, reason=reason)
    for files in (first, second):
        if not _examples_path(files).exists():
            reason = f"{files.run} has no per-example results ({_examples_path(files)}); score the task again"
            return dataclasses.replace(untested, reason=reason)
    lines = [results.read_lines(_examples_path(files), " and score it again") for files in (first, second)]
    if reason := _find_mismatch(runs, lines):
        return dataclasses.replace(untested, reason=reason)
    untested = dataclasses.replace(untested, note=_describe_settings(first, second))
    if (test := _compare_correlations(metric, lines)) is not None:
        return dataclasses.replace(untested, test=test)
    numbers = [_list_numbers(metric, some) for some in lines]
    weights = _find_weights(metric, lines[0], numbers[0], first.record)
    if weights is None or _find_weights(metric, lines[1], numbers[1], second.record) is None:
        reason = f"{metric} is neither a mean over examples nor a correlation; compare the intervals"
        return dataclasses.replace(untested, reason=reason)
    test = compare_means(numbers[0], numbers[1], None if (weights == 1).all() else weights)
    return _with_wins(dataclasses.replace(untested, test=test), lines, numbers)


def _with_wins(pair: Pair, lines: Sequence[Sequence[Line]], numbers: Sequence[np.ndarray]) -> Pair:
    """The pair with its wins and losses, by the lines and the scores of both runs."""
    gain = (numbers[1] - numbers[0]) * (-1 if results.is_lower_better(pair.metric) else 1)
    # A stable sort keeps the order of the task among equal differences.
    order = np.argsort(-np.abs(gain), kind="stable")

    def describe(chosen: np.ndarray) -> list[Difference]:
        scores = [(float(numbers[0][i]), float(numbers[1][i])) for i in chosen]
        return [_describe(lines[0][i], lines[1][i], both) for i, both in zip(chosen, scores, strict=True)]

    first_only, second_only = order[gain[order] < 0], order[gain[order] > 0]
    return dataclasses.replace(
        pair,
        is_binary=all(map(is_binary, numbers)),
        first_only=describe(first_only[:MAX_EXAMPLES]),
        second_only=describe(second_only[:MAX_EXAMPLES]),
        num_first=len(first_only),
        num_second=len(second_only),
        num_equal=len(gain) - len(first_only) - len(second_only),
    )


def _examples_path(files: TaskFiles) -> epath.Path:
    return files.path.with_suffix(".jsonl")


def _find_mismatch(runs: tuple[str, str], lines: Sequence[Sequence[Line]]) -> str:
    """Why the lines are not those of the same examples; "" if they are."""
    counts = [len(some) for some in lines]
    if counts[0] != counts[1] or not counts[0]:
        return (
            f"{runs[0]} has {counts[0]} examples, {runs[1]} has {counts[1]}; score both with the same --limit and file"
        )
    for first, second in zip(*lines, strict=True):
        for field in _IDENTITY:
            if first.get(field) != second.get(field):
                return (
                    f"the examples differ: the {field} of example {first['index']} is not the same in {runs[0]} and "
                    f"{runs[1]}; score both with the same file, prompt and shots"
                )
    return ""


def _list_numbers(metric: str, lines: Sequence[Line]) -> np.ndarray:
    """float64 [examples]: the metric of each example; nan where it has none. lm-eval's are in a field of their own."""
    numbers = (line.get("metrics", line).get(metric) for line in lines)
    return np.array([number if isinstance(number, int | float) else np.nan for number in numbers], np.float64)


def _compare_correlations(metric: str, lines: Sequence[Sequence[Line]]) -> PairedTest | None:
    """The test of a correlation of predictions with targets; None for another score."""
    if metric not in _CORRELATIONS:
        return None
    targets = np.array([line["target"] for line in lines[0]], np.float64)

    def correlate(predictions: np.ndarray) -> Callable[[np.ndarray], float]:
        return lambda indices: _CORRELATIONS[metric](predictions[indices], targets[indices])

    predictions = [np.array([line["prediction"] for line in some], np.float64) for some in lines]
    return compare_statistics(correlate(predictions[0]), correlate(predictions[1]), len(targets))


def _find_weights(
    metric: str, lines: Sequence[Line], numbers: np.ndarray, record: Mapping[str, Any]
) -> np.ndarray | None:
    """The weights with which the score of the task is the mean of these numbers: 1, or the bytes of the texts.

    None where it is not such a mean, as a correlation or a perplexity.
    """
    score = record["metrics"][metric]["value"]
    for weights in (np.ones(len(lines)), np.array([line.get("bytes", np.nan) for line in lines], np.float64)):
        if score is not None and np.isclose(weights @ numbers / weights.sum(), score, rtol=_TOLERANCE, atol=_TOLERANCE):
            return weights
    return None


def _describe(first: Line, second: Line, scores: tuple[float, float]) -> Difference:
    text = first.get("prompt", first.get("input", first.get("document")))
    return Difference(
        index=first["index"],
        text=_as_text(text),
        target=_as_text(_name_choice(first, first.get("target"))),
        predictions=(_predict(first), _predict(second)),
        scores=scores,
    )


def _predict(line: Line) -> str:
    return _as_text(_name_choice(line, line.get("prediction")))


def _name_choice(line: Line, answer: Any) -> Any:
    """lm-eval's answers of a multiple choice are numbers of the continuations."""
    continuations = line.get("continuations", ())
    is_number = isinstance(answer, int) and 0 <= answer < len(continuations)
    return continuations[answer].strip() if is_number else answer


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_as_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _describe_settings(first: TaskFiles, second: TaskFiles) -> str:
    """Settings of the task in which the runs differ, but for where its file lies."""

    def list_changes() -> Iterator[str]:
        for field, old, new in differences(first.record.get("settings", {}), second.record.get("settings", {})):
            if field not in ("path", "limit"):  # the examples were compared
                yield f"{field} {json.dumps(old)} in {first.run}, {json.dumps(new)} in {second.run}"

    return "; ".join(list_changes())
