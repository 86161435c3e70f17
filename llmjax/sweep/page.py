"""The page of a sweep: trials, scores against each field, and validation curves, as one HTML file."""

from collections.abc import Sequence
import math

from etils import epath

from llmjax import atomic
from llmjax.report import plot
from llmjax.report.markup import chart_grid, escape, excerpt, format_axis, format_number, html_page, section, table
from llmjax.run.inspection import align
from llmjax.sweep.space import Range
from llmjax.sweep.study import TrialResult, find_winner, rank

_MAX_CURVES = 8  # curves of the best trials that have a colour of their own
_WIDTH, _HEIGHT = 480, 240
_NONE = "\u2014"


def write_page(
    path: epath.Path, *, title: str, metric: str, ranges: Sequence[Range], trials: Sequence[TrialResult], paste: str
) -> None:
    """Write the page.

    paste  the winner's overrides for a command line; '': no trial is complete
    """
    winner = find_winner(trials, metric)
    parts = [_header(title, metric, trials, winner)]
    if winner is not None:
        parts.append(section("The winner, as overrides", excerpt(escape(paste), f"Trial {winner.number}.")))
    charts = [(f"{each.field} ({each.kind})", _scatter(each, trials, winner, metric)) for each in ranges]
    note = "Filled: complete. Hollow: pruned, at its last evaluation. Orange: the winner."
    parts.append(section("Score by field", chart_grid(charts), note=note))
    parts.append(_curves(trials, metric))
    note = "Seconds: of all starts of a trial's run, up to its last logged step where it was killed."
    if any(trial.seconds is None for trial in trials):
        note += f" {_NONE}: the run ended before its first step."
    parts.append(section("Trials", table(*_table(ranges, trials, metric, errors=True), texts=2), note=note))
    atomic.write_bytes(path, html_page(title, "\n".join(filter(None, parts))).encode())


def _table(
    ranges: Sequence[Range], trials: Sequence[TrialResult], metric: str, *, errors: bool
) -> tuple[list[str], list[list[str]]]:
    head = ["Trial", "state", *(each.field for each in ranges), metric, "seconds"]
    rows = []
    for trial in rank(trials, metric):
        values = dict(trial.overrides)
        state = f"{trial.state}: {trial.error[:120]}" if errors and trial.error else trial.state
        cells = [str(trial.number), state, *(values.get(each.field, _NONE) for each in ranges)]
        score = _NONE if trial.score is None else f"{trial.score:.4f}"
        rows.append([*cells, score, _NONE if trial.seconds is None else f"{trial.seconds:.0f}"])
    return head, rows


def describe_table(ranges: Sequence[Range], trials: Sequence[TrialResult], metric: str) -> list[str]:
    """The table of trials as lines of text, the best trial first."""
    head, rows = _table(ranges, trials, metric, errors=False)
    return align([tuple(row) for row in (head, *rows)])


def _header(title: str, metric: str, trials: Sequence[TrialResult], winner: TrialResult | None) -> str:
    counts = [f"{sum(trial.state == state for trial in trials)} {state}" for state in ("complete", "pruned", "failed")]
    running = sum(trial.state == "running" for trial in trials)
    text = ", ".join([*counts, *([f"{running} running"] if running else [])])
    hours = sum(trial.seconds or 0.0 for trial in trials) / 3600
    best = f"Best {metric}: {winner.score:.4f} (trial {winner.number}). " if winner else "No trial is complete. "
    text = f"{best}{len(trials)} trials: {text}. {hours:.2f} hours of training."
    return f"<header><h1>{escape(title)}</h1><p>{escape(text)}</p></header>"


def _scatter(each: Range, trials: Sequence[TrialResult], winner: TrialResult | None, metric: str) -> str:
    """An SVG of the scores over one field: one dot for each trial."""
    texts = {trial.number: dict(trial.overrides).get(each.field) for trial in trials}
    shown = [t for t in trials if t.score is not None and math.isfinite(t.score) and texts[t.number] is not None]
    if not shown:
        return '<p class="missing">No trial has a score yet.</p>'
    scores = [trial.score or 0.0 for trial in shown]
    low, high = min(scores), max(scores)
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin
    place = lambda fraction: plot.LEFT + fraction * (_WIDTH - plot.LEFT - plot.RIGHT)
    y = lambda score: _HEIGHT - plot.BOTTOM - (score - low) / (high - low) * (_HEIGHT - plot.TOP - plot.BOTTOM)
    parts = []
    values = plot.choose_ticks(low, high, 5)
    for value, text in zip(values, format_axis(values), strict=True):
        parts.append(
            f'<line class="grid" x1="{plot.LEFT}" x2="{_WIDTH - plot.RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text class="tick" x="{plot.LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    bottom = _HEIGHT - plot.BOTTOM
    parts.append(f'<line class="axis" x1="{plot.LEFT}" x2="{_WIDTH - plot.RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for fraction, text in _ticks(each):
        parts.append(
            f'<text class="tick" x="{place(fraction):.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>'
        )
    for trial in shown:
        text = texts[trial.number] or ""
        fill = "var(--dots)" if trial is winner else "var(--accent)" if trial.state == "complete" else "none"
        stroke = "var(--dots)" if trial is winner else "var(--accent)"
        title = f"trial {trial.number}, {trial.state}: {each.field}={text}, {metric} {format_number(trial.score)}"
        parts.append(
            f'<circle cx="{place(_fraction(each, text)):.1f}" cy="{y(trial.score):.1f}" r="4.5" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.4"><title>{escape(title)}</title></circle>'
        )
    label = escape(f"{metric} over {each.field}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _fraction(each: Range, text: str) -> float:
    """Where a value lies between the ends of the axis, 0 to 1."""
    if each.kind == "choice":
        return (each.choices.index(text) + 0.5) / len(each.choices)
    value, low, high = float(text), each.low, each.high
    if each.kind == "log":
        value, low, high = math.log(value), math.log(low), math.log(high)
    return 0.03 + 0.94 * (value - low) / (high - low)


def _ticks(each: Range) -> list[tuple[float, str]]:
    """(place, label) of the axis of a field."""
    if each.kind == "choice":
        longest = max(6, 60 // len(each.choices))
        shorten = lambda text: text if len(text) <= longest else f"{text[: longest - 1]}\u2026"
        return [(_fraction(each, text), shorten(text)) for text in each.choices]
    choose = plot.choose_log_ticks if each.kind == "log" else lambda low, high: plot.choose_ticks(low, high, 5)
    values = [value for value in choose(each.low, each.high) if each.kind != "int" or value == int(value)]
    return [(_fraction(each, repr(value)), f"{value:g}") for value in values]


def _curves(trials: Sequence[TrialResult], metric: str) -> str:
    """Scores over steps: the best trials in colours, the others faint."""
    order = [trial for trial in rank(trials, metric) if trial.curve]
    if all(len(trial.curve) < 2 for trial in order):
        return ""
    best, others = order[:_MAX_CURVES], order[_MAX_CURVES:]
    lines = [plot.Curve(f"trial {trial.number}", trial.curve, "faint") for trial in others]
    lines += [plot.Curve(f"trial {t.number}", t.curve, f"line run{number}") for number, t in enumerate(best)]
    items = "".join(f'<li class="run{number}"><i></i>trial {t.number}</li>' for number, t in enumerate(best))
    chart = plot.draw_curves(lines, label=metric, width=980, height=300)
    legend = f'<ul class="legend">{items}</ul>'
    return section(f"Validation {metric} during training", chart + legend, note="Curves that end early were pruned.")
