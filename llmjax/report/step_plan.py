"""The plan of a run's step, which `llmjax plan --workdir=DIR` keeps, beside what the run measured."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import statistics
from typing import Any

from llmjax.report import plot
from llmjax.report.markup import definition_list, facts_and_chart, section, table

_BAR_WIDTH = 30  # characters of the longest bar on a terminal


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A figure as planned, and the median of those that the run logged; None where it is unknown."""

    name: str
    form: str
    planned: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over planned."""
        return self.measured / self.planned if self.planned and self.measured else None

    def texts(self) -> tuple[str | None, str | None, str | None]:
        """Planned, measured and their ratio in words."""
        planned, measured = (None if x is None else self.form.format(x) for x in (self.planned, self.measured))
        return planned, measured, None if self.ratio is None else f"{self.ratio:.2f}"


def compare(plan: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """The step's seconds, tokens per second and MFU; `metrics` are the lines of metrics.jsonl."""
    lines = list(metrics)
    seconds, tokens = _number(plan, "step_seconds"), _number(plan, "step_tokens")
    rate = tokens / seconds if tokens and seconds else None
    return [
        Comparison("seconds of a step", "{:.4g}", seconds, _median(lines, "step_seconds")),
        Comparison("tokens per second", "{:,.0f}", rate, _median(lines, "tokens_per_second")),
        Comparison("MFU", "{:.1%}", _number(plan, "mfu"), _median(lines, "mfu")),
    ]


def describe_machine(plan: Mapping[str, Any]) -> str:
    """The machine, mesh and compiler of a plan."""
    slices = f"{plan['slices']} slices of " if plan.get("slices", 1) != 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.get("mesh", {}).items() if size != 1)
    depth = "quick depth" if plan.get("quick") else "full depth"
    machine = f"{slices}{plan.get('topology', '')}, {plan.get('devices', '')} devices"
    return ", ".join(filter(None, (machine, mesh, plan.get("compiler"), depth)))


def render(plan: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], device: str) -> str:
    """A section: the step's seconds by part as bars, the memory, and what the run measured beside it.

    device   what the run ran on
    """
    rows = compare(plan, metrics)
    step, parts = rows[0], _parts(plan)
    if step.planned is None:
        body = '<p class="missing">No time was predicted: the step does not fit, or the machine has no cost model.</p>'
    else:
        facts = [(f"{step.planned:.3f} s", "a step, planned")]
        if step.measured is not None and step.ratio is not None:
            facts += [(f"{step.measured:.3f} s", "measured, median"), (f"{step.ratio:.2f}", "measured / planned")]
        longest = max(parts.values(), default=0.0)
        bars = [plot.Bar(name, seconds, highlight=seconds == longest) for name, seconds in parts.items()]
        title = "Where the time of a step goes, seconds as planned"
        body = facts_and_chart(facts, title, plot.draw_bars(bars, label="Seconds of a step by part", unit="s"))
    measured = ""
    if any(row.measured is not None for row in rows):
        head = ("", f"planned, {plan.get('topology', '')}", f"measured, {device}".rstrip(", "), "measured / planned")
        measured = table(head, [(row.name, *(text or "" for text in row.texts())) for row in rows])
    facts = definition_list(_memory(plan))
    return section("Plan", body + measured + facts, note=f"{describe_machine(plan)}. {_describe_error(plan)}".strip())


def describe(plan: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same as lines of text for a terminal."""
    lines = [f"plan: {describe_machine(plan)}"]
    for row in compare(plan, metrics):
        planned, measured, ratio = row.texts()
        if planned is not None:
            beside = f", measured {measured}, {ratio} x" if ratio is not None else ""
            lines.append(f"  {row.name}: planned {planned}{beside}")
    parts = _parts(plan)
    longest = max(parts.values(), default=0.0)
    for name, seconds in parts.items():
        lines.append(f"  {name:20} {seconds:8.3f} s  {'█' * round(_BAR_WIDTH * seconds / longest)}".rstrip())
    return lines


def _parts(plan: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the parts of a step that take any."""
    return {name: seconds for name, seconds in (plan.get("parts") or {}).items() if seconds}


def _memory(plan: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    names = {
        "arguments (state and batch)": "argument_bytes",
        "activations, gradients and workspace": "temporary_bytes",
        "memory of a device": "hbm_bytes",
        "available": "hbm_limit",
    }
    sizes = ((name, _number(plan, key)) for name, key in names.items())
    return [(name, None if size is None else f"{size / 2**30:.2f} GiB") for name, size in sizes]


def _describe_error(plan: Mapping[str, Any]) -> str:
    error = plan.get("predicted_over_measured")
    if not error:
        return ""
    span = f"{error['lowest']:.2f} to {error['highest']:.2f}"
    return f"Of {error['runs']} published runs, predicted over measured seconds were {span}."


def _number(plan: Mapping[str, Any], key: str) -> float | None:
    value = plan.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [value for line in lines if (value := _number(line, name)) is not None]
    return statistics.median(values) if values else None
