"""The part of the report about tasks: their scores with intervals, and curves where several steps were scored."""

from collections.abc import Mapping
from typing import Any

from llmjax.report import plot
from llmjax.report.markup import chart_grid, collapsed, escape, section, table

Evals = Mapping[str, Mapping[int, Mapping[str, Any]]]  # name of a file -> step -> its content

_SHOWN = 8  # metrics of a task that are shown; the others open on a click


def render(evals: Evals) -> str:
    """A table for each task at its last scored step, and its main score over the steps; empty without tasks."""
    tasks = {name: by_step for name, by_step in evals.items() if "metrics" in by_step[max(by_step)]}
    if not tasks:
        return ""
    curves, parts = [], []
    for name, by_step in tasks.items():
        last = by_step[max(by_step)]
        rows = [_make_row(metric, number) for metric, number in last["metrics"].items()]
        head = (f"{name}, step {max(by_step):,}, {last['n']:,} examples", "value", "95% interval")
        parts.append(table(head, rows[:_SHOWN]))
        if "note" in last:
            parts.append(f'<p class="note">{escape(last["note"])}</p>')
        if rows[_SHOWN:]:
            parts.append(collapsed(f"{len(rows) - _SHOWN} more scores of {name}", table(head, rows[_SHOWN:])))
        main = last.get("main") or next(iter(last["metrics"]))
        if len(points := list_points(by_step, main)) > 1:
            curves.append((f"{name}: {main}", plot.draw_curves([plot.Curve(main, points)], label=f"{name} {main}")))
    return section("Tasks", chart_grid(curves) + "".join(parts))


def _make_row(metric: str, number: Mapping[str, float | None]) -> tuple[str, str, str]:
    value, low, high = (number[key] for key in ("value", "low", "high"))
    interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
    return metric, "undefined" if value is None else f"{value:.4f}", interval


def list_points(by_step: Mapping[int, Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, in order of steps."""
    values = ((step, by_step[step]["metrics"].get(metric, {}).get("value")) for step in sorted(by_step))
    return [(float(step), value) for step, value in values if value is not None]
