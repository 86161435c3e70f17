"""The page of `llmjax analyse`: what to do next, and the evidence for it."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llmjax import atomic
from llmjax.analysis.mismatch import LEVEL
from llmjax.analysis.result import Analysis, WorstExample
from llmjax.analysis.task_examples import TaskExamples
from llmjax.analysis.token_losses import TokenLosses
from llmjax.evals.paired import SIGNIFICANCE
from llmjax.evals.results import Estimate
from llmjax.report import plot
from llmjax.report.markup import collapsed, escape, excerpt, format_number, html_page, section, table

_MAX_CHARACTERS = 600  # of the text of an example
_SHOWN_ERRORS, _SHOWN_COPIES, _SHOWN_SLICES, _SHOWN_CONFUSIONS = 30, 20, 20, 10
_OPEN_EXAMPLES = 5  # of the worst ones; the others open on a click
# What the loss of an example is, by the kind of the task.
_LOSSES = {
    "choice": "nats of the right choice among all",
    "classify": "nats of the right class",
    "generate": "1 minus the token F1",
    "pairs": "nats by which the bad text is more likely",
    "perplexity": "bits per byte",
    "regress": "the squared error",
}
_FULL_HEAT = 10.0  # nats of a token with the strongest colour
_STYLE = """<style>
.heat span { background: rgb(192 57 43 / calc(0.6 * var(--heat))); border-radius: 2px; }
.heat i { color: var(--soft); font-style: normal; } .steps { margin: 0; padding-left: 22px; }
.steps li + li { margin-top: 12px; } .steps p { margin: 2px 0 0; color: var(--soft); }
a { color: var(--accent); } td.cell { text-align: right; background: rgb(15 110 110 / var(--heat)); }
td.wrong { background: rgb(192 57 43 / var(--heat)); } figure b { font-weight: 620; }
figure + details { margin-top: 12px; }
.wrap.labels td:not(.number):nth-child(n + 3) { overflow-wrap: normal; }
</style>"""


def write_page(analysis: Analysis, scored: TaskExamples, path: epath.Path, *, train_texts: Sequence[str] = ()) -> None:
    """Write the analysis as one HTML file that loads nothing.

    train_texts  those that near-copies refer to
    """
    parts = [
        _STYLE,
        render_header(analysis),
        render_steps(analysis),
        render_worst(analysis, scored),
        render_confusions(analysis, scored),
        render_slices(analysis),
        render_label_errors(analysis, scored),
        render_mismatch(analysis),
        render_copies(analysis, scored, train_texts),
        render_curve(analysis),
        f"<footer>Task {escape(analysis.task)}, results of step {analysis.step:,}. The same numbers are in "
        "analysis.json.</footer>",
    ]
    atomic.write_bytes(path, html_page(f"Error analysis of {analysis.task}", "\n".join(filter(None, parts))).encode())


def render_header(analysis: Analysis) -> str:
    """The task and its score."""
    score = Estimate(**analysis.score)
    about = f"{analysis.count:,} examples, kind {analysis.kind}, step {analysis.step:,}: {analysis.measure} {score}"
    return f"<header><h1>Error analysis of {escape(analysis.task)}</h1><p>{escape(about)}</p></header>"


def render_steps(analysis: Analysis) -> str:
    """The ranked recommendations, each with a link to its evidence."""
    items = "".join(
        f'<li><b>{escape(step.text)}</b><p>{escape(step.reason)} <a href="#{step.evidence}">Evidence</a></p></li>'
        for step in analysis.next_steps
    )
    note = (
        "What decides whether the score can be trusted comes first; the rest is ranked by the share of examples that "
        "it concerns."
    )
    return section("What to do next", f'<ol class="steps">{items}</ol>', note=note)


def render_worst(analysis: Analysis, scored: TaskExamples) -> str:
    """The worst examples, with probabilities of the classes, or with the losses of their tokens."""
    figures = [_render_worst_example(each, scored) for each in analysis.worst]
    body, others = "".join(figures[:_OPEN_EXAMPLES]), figures[_OPEN_EXAMPLES:]
    if others:
        body += collapsed(f"{len(others)} more", "".join(others))
    note = f"The {len(analysis.worst)} examples with the largest losses: {_LOSSES[analysis.kind]}."
    if any(each.token_losses for each in analysis.worst):
        note += f" Colour: negative log-likelihood of a token; the strongest is that of {_FULL_HEAT:.0f} nats or more."
    return _anchor("worst", section("Worst examples", body, note=note))


def render_confusions(analysis: Analysis, scored: TaskExamples) -> str:
    """The confusion matrix, and the most frequent confusions with examples."""
    if analysis.confusion_matrix is None or analysis.confusions is None:
        return ""
    parts = [_render_matrix(analysis.confusion_matrix, analysis.classes)]
    for each in analysis.confusions[:_SHOWN_CONFUSIONS]:
        body = "".join(excerpt(escape(_cut(scored.texts[i])), f"example {i}") for i in each.indices)
        parts.append(collapsed(f"{each.target} predicted as {each.prediction}: {each.count:,} examples", body))
    return _anchor(
        "confusions", section("Confusions", "".join(parts), note="A row for each class, a column for each prediction.")
    )


def render_slices(analysis: Analysis) -> str:
    """The slices with the smallest p-values."""
    shown = analysis.slices[:_SHOWN_SLICES]
    rows = [
        (
            f"{each.field}: {each.value}",
            each.size,
            f"{each.error:.3f}",
            f"{each.rest:.3f}",
            f"{each.p_value:.2g}",
            f"{each.corrected:.2g}",
            "worse" if each.is_significant else "no",
        )
        for each in shown
    ]
    name = analysis.error_name
    head = ("Slice", "examples", f"{name} inside", "outside", "p", "corrected p", f"below {SIGNIFICANCE}")
    test = "Fisher's exact test" if analysis.is_binary else "the test of Mann and Whitney"
    note = (
        f"Is the {name} larger inside than outside? p: {test}, one-sided, corrected for all {len(analysis.slices)} "
        "slices by Holm's method."
    )
    body = table(head, rows) if rows else '<p class="missing">There are too few examples for slices.</p>'
    return _anchor("slices", section("Slices that fail", body, note=note))


def render_label_errors(analysis: Analysis, scored: TaskExamples) -> str:
    """The likely label errors, the likeliest first."""
    if analysis.label_errors is None:
        return _render_missing("label_errors", "Likely label errors", analysis.missing)
    errors = analysis.label_errors
    rows = [
        (error.index, _cut(scored.texts[error.index], 220), error.given, error.suggested, f"{error.score:.3f}")
        for error in errors[:_SHOWN_ERRORS]
    ]
    shown = f", the first {len(rows)} of {len(errors):,}" if len(errors) > len(rows) else ""
    note = (
        f"Confident learning on out-of-fold probabilities of logistic regression on {analysis.vectors}{shown}. Score: "
        "probability of the suggested class minus that of the given one."
    )
    head = ("Example", "text", "given", "suggested", "score")
    body = f'<div class="wrap labels">{table(head, rows, texts=4)}</div>' if rows else '<p class="missing">None.</p>'
    if reason := analysis.missing.get("vectors"):
        body += f'<p class="note">{escape(reason)}.</p>'
    return _anchor("label_errors", section("Likely label errors", body, note=note))


def render_mismatch(analysis: Analysis) -> str:
    """The tests of training texts against the task's."""
    mismatch = analysis.mismatch
    if mismatch is None:
        return _render_missing("mismatch", "Train/dev mismatch", analysis.missing)
    rows = [
        (test.name, test.measure, f"{test.value:.3g}", f"{test.p_value:.2g}", f"{test.corrected:.2g}")
        for test in mismatch.tests
    ]
    verdict = (
        f"The task's texts differ from the training texts, at the level {LEVEL} of all three tests together."
        if mismatch.is_alarm
        else f"No difference at the level {LEVEL} of all three tests together."
    )
    words = ""
    if mismatch.is_alarm:
        words = table(
            ("More frequent in", "words"),
            [
                ("training texts", ", ".join(mismatch.first_words)),
                ("the task", ", ".join(mismatch.second_words)),
            ],
            texts=2,
        )
    note = (
        f"{mismatch.counts[0]:,} training texts of {analysis.train_origin} against {mismatch.counts[1]:,} of the task. "
        "Corrected by Holm's method."
    )
    body = f"<p>{escape(verdict)}</p>{table(('Test', 'measure', 'value', 'p', 'corrected p'), rows, texts=2)}{words}"
    return _anchor("mismatch", section("Train/dev mismatch", body, note=note))


def render_copies(analysis: Analysis, scored: TaskExamples, train_texts: Sequence[str]) -> str:
    """The examples that are near-copies of training texts."""
    copies = analysis.near_copies
    if copies is None:
        return _render_missing("near_copies", "Near-duplicates of training texts", analysis.missing)
    figures = ""
    for copy in copies[:_SHOWN_COPIES] if len(train_texts) else ():
        text = f"task: {_cut(scored.texts[copy.index], 300)}\ntrain: {_cut(train_texts[copy.train_index], 300)}"
        figures += excerpt(escape(text), f"example {copy.index}, similarity {copy.similarity:.2f}")
    body = (
        collapsed(f"The most similar: {min(len(copies), _SHOWN_COPIES)} of {len(copies):,}", figures) if figures else ""
    )
    scores = ""
    if analysis.score_of_copies is not None and analysis.score_of_others is not None:
        scores = (
            f" Mean {analysis.measure} of the copies {analysis.score_of_copies:.3f}, of the others "
            f"{analysis.score_of_others:.3f}."
        )
    text = f"{len(copies):,} of {analysis.count:,} examples are near-duplicates of training texts.{scores}"
    note = (
        f"Compared with {analysis.train_read:,} of {analysis.train_total:,} training texts, by MinHash of 5-word "
        "shingles."
    )
    title = "Near-duplicates of training texts"
    return _anchor("near_copies", section(title, f"<p>{escape(text)}</p>{body}", note=note))


def render_curve(analysis: Analysis) -> str:
    """The learning curve, its fit, and the forecast."""
    curve = analysis.learning_curve
    if curve is None:
        return _render_missing("learning_curve", "Learning curve", analysis.missing)
    sizes = curve.sizes
    lines = [
        plot.Curve(
            "fitted power law",
            list(zip(sizes, curve.fitted, strict=True)) + [(f.size, f.error) for f in curve.forecasts],
            "faint",
        ),
        plot.Curve("error", list(zip(sizes, curve.errors, strict=True)), "dots"),
    ]
    chart = plot.draw_curves(lines, label="Error rate", width=980, height=260, over="training examples")
    rows = [
        (f"{each.size:,}", f"{each.error:.4f}", f"{each.gain:+.4f}", f"{each.low:+.4f} to {each.high:+.4f}")
        for each in curve.forecasts
    ]
    a, b, c = curve.law
    source = analysis.missing.get("learning_curve_train", "")
    source = f"; {source}" if source else ""
    note = (
        f"Error of logistic regression on {analysis.vectors} by training examples, measured on {curve.num_test:,} "
        f"examples of the task{source}. Fit: {format_number(a)} n^-{b:.2f} + {format_number(c)}. "
        "The model itself may gain more or less."
    )
    forecast = table(("Training examples", "predicted error", "gain against now", "95% interval"), rows)
    return _anchor("learning_curve", section("Learning curve", chart + forecast, note=note))


def _anchor(name: str, html: str) -> str:
    return f'<div id="{name}">{html}</div>'


def _render_missing(name: str, title: str, missing: Mapping[str, str]) -> str:
    reason = missing.get(name, "")
    return _anchor(name, section(title, f'<p class="missing">{escape(f"None: {reason}.")}</p>')) if reason else ""


def _render_worst_example(worst: WorstExample, scored: TaskExamples) -> str:
    line = scored.lines[worst.index]
    parts = []
    if worst.token_losses:
        shown = ""  # the same prompt is shown once
        for each in worst.token_losses:
            parts.append(_render_heat(each, "\u2026" if each.before == shown else _cut_beginning(each.before)))
            shown = each.before
    else:
        parts.append(escape(_cut(scored.texts[worst.index])))
    if "probabilities" in line:
        shares = sorted(line["probabilities"].items(), key=lambda item: -item[1])
        parts.append(escape("probabilities: " + ", ".join(f"{name} {value:.3f}" for name, value in shares)))
    caption = f"example {worst.index}, loss {format_number(worst.loss)}"
    if line.get("target") is not None:
        caption += f"; target: {_show(line['target'])}; prediction: {_show(line['prediction'])}"
    return excerpt("\n".join(parts), caption)


def _render_heat(text: TokenLosses, before: str) -> str:
    """Tokens with colours by their losses, after the end of the text before them; the sum is written above."""
    spans, loss = "", 0.0
    for token, nats in zip(text.tokens, text.losses, strict=True):
        loss += nats
        if token:  # else it is a part of the next character
            heat = min(max(loss, 0) / _FULL_HEAT, 1)
            spans += f'<span style="--heat:{heat:.2f}" title="{loss:.2f} nats">{escape(token)}</span>'
            loss = 0.0
    total = sum(text.losses)
    count = len(text.tokens)
    head = f"<b>{escape(text.title)}</b>, {total:.1f} nats in {count} token{'s' * (count != 1)}"
    context = f"<i>{escape(before)}</i>" if text.before else ""
    return f'{head}\n<span class="heat">{context}{spans}</span>'


def _render_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """The confusion matrix, each row coloured by its shares."""
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in ("", *classes))
    rows = []
    for row, (name, counts) in enumerate(zip(classes, matrix, strict=True)):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td class="{"cell" if column == row else "cell wrong"}" style="--heat:{0.6 * count / total:.2f}">'
            f"{count:,}</td>"
            for column, count in enumerate(counts)
        )
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _show(value: Any) -> str:
    if isinstance(value, list):
        value = " or ".join(map(str, value))
    return _cut(format_number(value) if isinstance(value, float) else str(value), 200)


def _cut_beginning(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"\u2026{text[-_MAX_CHARACTERS:]}"


def _cut(text: str, most: int = _MAX_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]}\u2026"
