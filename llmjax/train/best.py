"""The best evaluation of a run, and when to stop because none has improved on it: functions of all evaluations."""

from collections.abc import Mapping
import math
from typing import Any

from llmjax.errors import UserError, suggest
from llmjax.evals import results

Evaluations = dict[int, dict[str, float]]  # step -> its scores of the whole validation split, and of tasks


def select_scores(scores: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The scores of an evaluation that can be compared. Raises UserError where the metric is none of them.

    scores   "total", and where tasks were scored "tasks", as `TrainContext.evaluate` returns them
    """
    every = scores["total"] | scores.get("tasks", {})
    total = {name: value for name, value in every.items() if isinstance(value, float)}
    if metric not in total:
        raise UserError(
            f"eval.metric={metric!r}{suggest(metric, total)}: the scores of this run are {', '.join(total)}; choose one"
        )
    return total


def find_best(evaluations: Evaluations, metric: str) -> int | None:
    """The step of the best evaluation, the first one of equals; None without any."""
    is_lower_better = results.is_eval_metric_lower_better(metric)

    def cost(step: int) -> float:
        value = evaluations[step].get(metric, math.nan)
        value = value if is_lower_better else -value
        return math.inf if math.isnan(value) else value

    return min(sorted(evaluations), key=cost, default=None)


def is_exhausted(evaluations: Evaluations, metric: str, stop_after: int) -> bool:
    """Whether the last `stop_after` evaluations did not improve on the best one before them; 0: never."""
    best = find_best(evaluations, metric)
    return bool(stop_after) and best is not None and sum(step > best for step in evaluations) >= stop_after
