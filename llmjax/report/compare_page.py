"""The page of `llmjax compare`: scores, paired tests, wins and losses, costs, curves and configs of several runs."""

from collections.abc import Iterable, Sequence

from etils import epath

from llmjax import atomic
from llmjax.evals.paired import SIGNIFICANCE
from llmjax.evals.paired_tasks import Difference, Pair
from llmjax.evals.results import Estimate
from llmjax.report import plot
from llmjax.report.comparison import Comparison, Score, is_task
from llmjax.report.files import RunFiles
from llmjax.report.markup import chart_grid, collapsed, escape, excerpt, format_number, html_page, section, table
from llmjax.report.task_scores import list_points

_SMOOTH_FROM = 100  # points from which a curve is smoothed, over a hundredth of them
_MAX_CHARACTERS = 600  # of the text of an example
_SPLIT_CURVES = (
    ("loss", "loss, nats per target"),
    ("bits_per_byte", "bits per byte"),
    ("accuracy", "accuracy"),
    ("macro_f1", "macro F1"),
    ("spearman", "Spearman correlation"),
)


def write_page(comparison: Comparison, path: epath.Path) -> None:
    """Write the comparison as one HTML file that loads nothing."""
    parts = (
        render_header,
        render_scores,
        render_tests,
        render_examples,
        render_costs,
        render_curves,
        render_config,
        render_footer,
    )
    body = "\n".join(part(comparison) for part in parts)
    atomic.write_bytes(path, html_page(" and ".join(comparison.names), body).encode())


def render_header(comparison: Comparison) -> str:
    """The names of the runs, and their colours in the plots."""
    paths = [
        f"{name}: {run.workdir}" if name != str(run.workdir) else name
        for name, run in zip(comparison.names, comparison.runs, strict=True)
    ]
    return f"<header><h1>{len(paths)} runs compared</h1>{_legend(paths)}</header>"


def render_scores(comparison: Comparison) -> str:
    """The scores of all runs with their intervals: the main ones, and the others on a click."""
    names, runs = comparison.names, comparison.runs
    newest = [max(step for by_step in run.evals.values() for step in by_step) if run.evals else None for run in runs]
    steps = [name if step is None else f"{name}, step {step:,}" for name, step in zip(names, newest, strict=True)]
    head = ("Score", *steps)
    rows = [(_name_score(score), *map(_format_cell, score.values, score.steps, newest)) for score in comparison.quality]
    parts = [table(head, rows)]
    others = [score for score in comparison.scores if not score.is_main]
    for name in dict.fromkeys(score.name for score in others):
        rows = [(s.metric, *map(_format_estimate, s.values)) for s in others if s.name == name]
        parts.append(collapsed(f"{len(rows)} more scores of {name}", table(head, rows)))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in comparison.notes)
    note = (
        "At the newest step that was scored. In brackets: bootstrap 95% intervals, which scores of splits do not have."
    )
    return section("Scores", "".join(parts) + notes, note=note)


def render_tests(comparison: Comparison) -> str:
    """The paired test of each task."""
    tested = [pair for pair in comparison.pairs if pair.test is not None]
    rows = [_make_test_row(pair) for pair in tested]
    head = ("Task", "runs", "difference", "95% interval", "test", "p", "corrected p", f"below {SIGNIFICANCE}")
    body = f'<div class="wrap">{table(head, rows, texts=2)}</div>' if rows else ""
    for pair in comparison.pairs:
        about = f"{pair.task}, {' and '.join(pair.runs)}"
        if pair.reason:
            body += f'<p class="missing">{escape(f"{about}: no test: {pair.reason}.")}</p>'
        if pair.note:
            body += f'<p class="note">{escape(f"{about}: settings differ: {pair.note}.")}</p>'
    if not comparison.pairs:
        text = "No task was scored in two runs. Splits have no per-example results, so there is no test."
        body += f'<p class="missing">{text}</p>'
    note = (
        "Both runs on the same examples, with paired bootstrap intervals. p: exact McNemar test for scores that are 0 "
        "or 1, random sign flips for other means, the bootstrap for correlations. Corrected by Holm's method for "
        f"{len(tested)} test{'' if len(tested) == 1 else 's'}."
    )
    return section("Paired tests", body, note=note if tested else "")


def render_examples(comparison: Comparison) -> str:
    """Of each task, how many examples each run wins, and the first of them."""
    parts = []
    for pair in comparison.pairs:
        if pair.test is None or not pair.num_first + pair.num_second:
            continue
        first, second = pair.runs
        form = "only {} right" if pair.is_binary else "{} better"
        head = (f"{pair.task}: {pair.metric}", form.format(first), form.format(second), "no difference")
        parts.append(table(head, [("examples", pair.num_first, pair.num_second, pair.num_equal)]))
        for (winner, loser), examples, count in (
            ((first, second), pair.first_only, pair.num_first),
            ((second, first), pair.second_only, pair.num_second),
        ):
            if examples:
                shown = f"{'the first ' if pair.is_binary else 'largest differences, '}{len(examples)} of {count:,}"
                body = "".join(_render_example(example, pair) for example in examples)
                title = f"{winner} is right, {loser} is wrong" if pair.is_binary else f"{winner} is better than {loser}"
                parts.append(collapsed(f"{title}: {shown}", body))
    return section("Wins and losses", "".join(parts)) if parts else ""


def render_costs(comparison: Comparison) -> str:
    """What each run took, above its main scores."""
    costs = [(name, *("\u2014" if value is None else value for value in values)) for name, values in comparison.costs]
    quality = [
        (_name_score(score), *("\u2014" if value is None else _format_value(value) for value in score.values))
        for score in comparison.quality
    ]
    note = (
        "Costs of training alone. Tokens of an encoder-decoder are those of its decoder. A dash: the files of the "
        "run do not say, as those of an imported model."
    )
    return section("Cost beside quality", table(("", *comparison.names), [*costs, *quality]), note=note)


def render_curves(comparison: Comparison) -> str:
    """Training loss against steps, and against tokens where steps differ in size; scores over steps."""
    names, runs = comparison.names, comparison.runs
    parts = []
    for over, axis in (("steps", "step"), ("scored tokens", "total_targets")):
        if over == "steps" or _has_different_steps(runs):
            curves = _make_curves(names, [_smooth(_loss_against(run, axis)) for run in runs])
            if curves:
                chart = plot.draw_curves(curves, label="Training loss", width=980, height=300, over=over)
                title = f"<h3>Training loss, nats per target, over {over}</h3>"
                parts.append(f'<div class="part">{title}{chart}</div>')
    charts = []
    for split in ("validation", "test"):
        for metric, title in _SPLIT_CURVES:
            by_run = [_list_split_points(run, split, metric) for run in runs]
            charts += _chart(f"{split}: {title}", names, by_run)
    for name in dict.fromkeys(score.name for score in comparison.quality):
        if is_task([run.last_eval(name) for run in runs]):
            metric = next(score.metric for score in comparison.quality if score.name == name)
            charts += _chart(f"{name}: {metric}", names, [list_points(run.evals.get(name, {}), metric) for run in runs])
    body = "".join(parts) + (chart_grid(charts) if charts else "")
    if not body:
        return section("Curves", '<p class="missing">No run logged a step of training.</p>')
    return section("Curves", body + _legend(names))


def render_config(comparison: Comparison) -> str:
    """The fields of the configs that differ."""
    if not comparison.config:
        return section("Config", '<p class="missing">The configs are the same.</p>')
    rows = [(field, *("\u2014" if value is None else value for value in values)) for field, values in comparison.config]
    count = len(rows)
    body = f'<div class="wrap">{table(("Field", *comparison.names), rows, texts=1 + len(comparison.names))}</div>'
    return section(
        "Config", body, note=f"{count} field{' differs' if count == 1 else 's differ'}; all others are equal."
    )


def render_footer(comparison: Comparison) -> str:
    """The source of the numbers."""
    paths = ", ".join(str(run.workdir) for run in comparison.runs)
    return f"<footer>All numbers are from the files in {escape(paths)}.</footer>"


def _legend(texts: Sequence[str]) -> str:
    items = "".join(f'<li class="run{number}"><i></i>{escape(text)}</li>' for number, text in enumerate(texts))
    return f'<ul class="legend">{items}</ul>'


def _name_score(score: Score) -> str:
    return f"{score.name}: {score.metric.replace('_', ' ')}"


def _format_value(value: Estimate) -> str:
    return "undefined" if value.value is None else f"{value.value:.4f}"


def _format_estimate(value: Estimate | None) -> str:
    if value is None:
        return "\u2014"
    interval = "" if value.low is None or value.high is None else f" [{value.low:.4f}, {value.high:.4f}]"
    return _format_value(value) + interval


def _format_cell(value: Estimate | None, step: int | None, newest: int | None) -> str:
    """An estimate, with its step where the run has newer scores."""
    return _format_estimate(value) + ("" if value is None or step == newest else f" at step {step:,}")


def _make_test_row(pair: Pair) -> tuple[str, ...]:
    assert pair.test is not None and pair.corrected is not None
    difference = pair.test.difference
    interval = "" if difference.low is None else f"{difference.low:+.4f} to {difference.high:+.4f}"
    return (
        f"{pair.task}: {pair.metric}",
        f"{pair.runs[1]} minus {pair.runs[0]}",
        f"{difference.value:+.4f}",
        interval,
        pair.test.name,
        f"{pair.test.p_value:.2g}",
        f"{pair.corrected:.2g}",
        "significant" if pair.is_significant else "no",
    )


def _render_example(example: Difference, pair: Pair) -> str:
    lines = [_cut(example.text), f"target: {_cut(example.target)}"] if example.target else [_cut(example.text)]
    for run, prediction, score in zip(pair.runs, example.predictions, example.scores, strict=True):
        answer = f": {_cut(prediction)}" if prediction else ""
        lines.append(f"{run} ({pair.metric} {format_number(score)}){answer}")
    return excerpt("\n".join(map(escape, lines)), f"example {example.index}")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}\u2026"


def _has_different_steps(runs: Sequence[RunFiles]) -> bool:
    """Whether the runs scored different numbers of targets in a step: by more than a tenth, since packing varies."""
    last = [run.metrics[-1] for run in runs if run.metrics and run.metrics[-1].get("total_targets")]
    sizes = [line["total_targets"] / line["step"] for line in last]
    return len(sizes) > 1 and max(sizes) > 1.1 * min(sizes)


def _loss_against(run: RunFiles, axis: str) -> list[tuple[float, float]]:
    loss = dict(run.curve("loss"))
    return [(line[axis], loss[line["step"]]) for line in run.metrics if line["step"] in loss and axis in line]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return plot.smooth(points, len(points) / _SMOOTH_FROM) if len(points) > _SMOOTH_FROM else points


def _make_curves(names: Sequence[str], by_run: Sequence[Sequence[tuple[float, float]]]) -> list[plot.Curve]:
    """The curves of the runs that have one, each in the colour of its run."""
    numbered = enumerate(zip(names, by_run, strict=True))
    return [plot.Curve(name, points, f"line run{number}") for number, (name, points) in numbered if points]


def _list_split_points(run: RunFiles, split: str, metric: str) -> list[tuple[float, float]]:
    """(step, score) of a split, in order."""
    by_step = run.evals.get(split, {})
    values = ((step, by_step[step]["total"].get(metric)) for step in sorted(by_step))
    return [(float(step), value) for step, value in values if value is not None]


def _chart(
    title: str, names: Sequence[str], by_run: Sequence[Sequence[tuple[float, float]]]
) -> Iterable[tuple[str, str]]:
    """A plot where two runs have the score, one of them at several steps; else nothing."""
    if max(map(len, by_run)) > 1 and sum(map(bool, by_run)) > 1:
        yield title, plot.draw_curves(_make_curves(names, by_run), label=title)
