"""The report of a training run: scores, curves, speed, configuration, data, samples."""

from collections.abc import Iterable
import datetime
import json
import math
import statistics
from typing import Any

from etils import epath

from llmjax.evals.label_scores import describe_baseline
from llmjax.metrics import duration
from llmjax.report import cost, plot, step_plan, task_scores
from llmjax.report.files import RunFiles, describe_phase, list_compressors, list_phases, list_row_lengths, read
from llmjax.report.markup import (
    chart_grid,
    collapsed,
    definition_list,
    escape,
    excerpt,
    facts_and_chart,
    format_count,
    format_number,
    html_page,
    missing_part,
    section,
    table,
)
from llmjax.run import workdir as workdirs

_MARKS = {"restart": "restarted", "skipped": "steps skipped, not finite"}
_SPLITS = ("train", "validation", "test")
_LABEL_SCORES = {
    "margin": "margin",
    "macro_f1": "macro F1",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
_MAX_OPERATIONS = 15  # rows in the table of the profile
_SMOOTH_FROM = 100  # points from which a curve is smoothed, over a hundredth of them


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Write WORKDIR/report.html and report.json from the run's files; parts with missing files say so.

    Returns the path of the page.
    """
    run = read(workdir)
    parts = (
        render_header,
        render_headline,
        render_learning,
        render_speed,
        render_plan,
        render_profile,
        render_cost,
        render_summary,
        render_data,
        render_evaluation,
        render_tasks,
        render_samples,
        render_config,
        render_footer,
    )
    path = run.workdir / workdirs.REPORT
    workdirs.write_json(run.workdir / workdirs.REPORT_JSON, {"cost": cost.to_json(cost.compute(run))})
    path.write_text(html_page(f"{run.workdir.name}: training report", "\n".join(part(run) for part in parts)))
    return path


def render_header(run: RunFiles) -> str:
    """Name of the run, progress, size, devices and start."""
    about, num_steps, facts = run.run or {}, (run.config or {}).get("train", {}).get("steps"), []
    if run.metrics and num_steps:
        facts.append(f"step {format_count(run.metrics[-1]['step'])} of {format_count(num_steps)}")
    if "parameters" in about:
        facts.append(f"{format_number(about['parameters'])} parameters")
    if "device" in about and "num_devices" in about:
        facts.append(f"{about['num_devices']} x {about['device']}")
    if "started" in about:
        facts.append(f"started {_format_time(about['started'])}")
    return f"<header><h1>{escape(run.workdir.name)}</h1><p>{escape(' · '.join(facts))}</p></header>"


def render_headline(run: RunFiles) -> str:
    """Scores of the validation split, compared with compressors or with the majority-class baseline."""
    scores = run.last_eval("validation")
    if scores is None:
        return section("Validation", _missing(run, "No evaluation of the validation split yet.", "eval"))
    total = scores["total"]
    bits = total["bits_per_byte"]
    facts = [] if bits is None else [(f"{bits:.4f}", "bits per byte")]
    facts += [(f"{total['accuracy']:.2%}", "accuracy")] if bits is None and total["accuracy"] is not None else []
    facts += [(f"{total[name]:.4f}", text) for name, text in _LABEL_SCORES.items() if name in total]
    if total["perplexity"] is None:
        facts.append((f"{total['loss']:.4f}", "loss"))
    else:
        facts += [(f"{total['loss']:.4f}", "loss, nats per token"), (f"{total['perplexity']:,.2f}", "perplexity")]
    if total["accuracy"] is None:
        title, bars = "Numbers", ""
    elif bits is None:
        rows = [plot.Bar("this model", 100 * total["accuracy"], highlight=True)]
        name, baseline = describe_baseline(total)
        rows.append(plot.Bar(name, 100 * baseline))
        title, bars = "Accuracy, higher is better", plot.draw_bars(rows, label="Accuracy", unit="%")
    else:
        rows = [plot.Bar("this model", bits, highlight=True)]
        rows += [plot.Bar(name, 8 * size / total["text_bytes"]) for name, size in list_compressors(run.manifest)]
        title, bars = "Bits per byte, lower is better", plot.draw_bars(rows, label="Compression", unit="bits per byte")
    note = (
        f"{scores.get('parameters', 'parameters')} at step {format_count(scores.get('step'))}, "
        f"{format_count(total['documents'])} documents, {format_count(total['text_bytes'])} bytes"
    )
    lossy = f'<p class="note">{escape(scores["note"])}</p>' if scores.get("note") else ""
    return section("Validation", facts_and_chart(facts, title, bars) + lossy, note=note)


def render_learning(run: RunFiles) -> str:
    """Loss of training and validation, learning rate and gradient norm."""
    title = "Learning"
    if not run.metrics:
        return section(title, _missing(run, "No step was logged yet.", "train"))
    marks, loss = _make_marks(run), run.curve("loss")
    if len(loss) > _SMOOTH_FROM:
        smoothed = plot.smooth(loss, len(loss) / _SMOOTH_FROM)
        curves = [plot.Curve("training loss", loss, "faint"), plot.Curve("training loss, smoothed", smoothed)]
        keys = [("faint", "training, each logged step"), ("line", "training, smoothed")]
    else:
        curves, keys = [plot.Curve("training loss", loss)], [("line", "training, each logged step")]
    if validation := [
        (step, scores["total"]["loss"]) for step, scores in sorted(run.evals.get("validation", {}).items())
    ]:
        curves.append(plot.Curve("validation loss", validation, "dots"))
        keys.append(("dots", "validation"))
    keys += [(kind, name) for kind, name in _MARKS.items() if any(mark.kind == kind for mark in marks)]
    legend = "".join(f'<li class="{style}"><i></i>{escape(name)}</li>' for style, name in keys)
    loss_plot = plot.draw_curves(curves, label="Loss", marks=marks, width=980, height=320)
    others = _plot_metrics(
        run, [("Learning rate", "learning_rate", True), ("Gradient norm", "grad_norm", False)], marks
    )
    body = f'<h3>Loss, nats per token</h3>{loss_plot}<ul class="legend">{legend}</ul>{others}'
    return section(title, body, note="Hover over a mark or a dot to see its step and value.")


def render_speed(run: RunFiles) -> str:
    """Tokens per second and time spent waiting for data, over steps; MFU if the device's peak is known."""
    if not run.metrics:
        return ""
    waits = dict(run.curve("data_wait_seconds"))
    steps = run.curve("step_seconds")
    shares = [(step, 100 * waits[step] / seconds) for step, seconds in steps if seconds and step in waits]
    facts = definition_list(
        [
            ("time in steps", duration(run.sum_over_steps("step_seconds")) if steps else None),
            ("targets scored", format_count(_last_value(run, "total_targets"))),
            ("median tokens per second", _median(run.curve("tokens_per_second"), "{:,.0f}")),
            ("median time of a step", _median(steps, "{:.4g} s")),
            ("waiting for data, median", _median(shares, "{:.2g}%")),
            ("median MFU", _median(run.curve("mfu"), "{:.1%}")),
        ]
    )
    plots = [("Tokens per second", "tokens_per_second", True), ("Wait for data, % of a step", shares, True)]
    if run.curve("mfu"):
        plots.append(("MFU, %", [(step, 100 * y) for step, y in run.curve("mfu")], True))
    return section("Speed", facts + _plot_metrics(run, plots, _make_marks(run)))


def render_plan(run: RunFiles) -> str:
    """The plan of the step beside what was measured; empty without a plan."""
    if run.plan is None:
        return ""
    about = run.run or {}
    device = f"{about['num_devices']} x {about['device']}" if "device" in about and "num_devices" in about else ""
    return step_plan.render(run.plan, run.metrics, device)


def render_profile(run: RunFiles) -> str:
    """The operations of the profiler trace that take the most time; empty without a trace."""
    if run.profile is None:
        return ""
    total = run.profile.seconds
    rows = [
        (operation.name, f"{1e3 * operation.seconds:,.3f}", f"{operation.seconds / (total or 1):.1%}", operation.count)
        for operation in run.profile.operations[:_MAX_OPERATIONS]
    ]
    body = table(("Operation", "time, ms", "share", "count"), rows)
    note = (
        f"{format_count(len(run.profile.operations))} operations took {1e3 * total:,.1f} ms, summed over devices and "
        "threads; the time of a loop does not include its body. "
        f"Open the trace at ui.perfetto.dev: {run.profile.path}"
    )
    return section("Profile", body, note=note)


def render_cost(run: RunFiles) -> str:
    """Device-hours, energy, CO2 and money; empty before a step was logged."""
    return cost.render(run) if run.metrics else ""


def render_summary(run: RunFiles) -> str:
    """Devices, mesh, parameters, optimizer and versions of the run."""
    about = run.run
    if about is None:
        return section("Run", _missing(run, "There is no run.json.", "train"))
    settings = run.config or {}
    train, seq_len = settings.get("train", {}), settings.get("data", {}).get("seq_len")
    batch = train.get("global_batch")
    later = "".join(f"; {size:,} rows from sample {start:,}" for start, size in train.get("batch_schedule", ()))
    mesh = " x ".join(f"{axis} {size}" for axis, size in about.get("mesh", {}).items())
    teacher = about.get("teacher")
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    facts = definition_list(
        [
            ("run", about.get("run_id")),
            ("started", _format_time(about["started"]) if "started" in about else None),
            ("device", f"{about.get('num_devices', '')} x {about.get('device', '')}"),
            ("processes", about.get("processes")),
            ("mesh", mesh),
            ("compiled by", about.get("backend")),
            ("parameters", about.get("parameters")),
            ("optimizer", about.get("optimizer")),
            ("teacher", f"{teacher.get('workdir')}, step {teacher.get('step')}" if teacher else None),
            ("evaluated", about.get("eval_params")),
            ("rows x tokens a step", f"{batch} x {seq_len}{later}" if batch and seq_len else None),
            *((f"phase {name}", describe_phase(phase)) for name, phase in list_phases(settings)),
            ("restarts", len(about.get("restarts", []))),
            ("steps skipped, not finite", format_count(_last_value(run, "skipped_steps"))),
            ("versions", versions),
        ]
    )
    total = about.get("parameters") or math.nan
    parts = [(name, size, f"{size / total:.1%}") for name, size in about.get("parameters_by_part", {}).items()]
    by_part = table(("Parameters", "count", "share"), parts) if parts else ""
    unsharded = "".join(f"<li>{escape(line)}</li>" for line in about.get("unsharded_params", []))
    if unsharded:
        unsharded = collapsed("Parameters that stay unsharded", f"<ul>{unsharded}</ul>")
    return section("Run", facts + by_part + unsharded)


def render_data(run: RunFiles) -> str:
    """The token store by source and split, and how its documents were packed into rows."""
    parts = []
    if run.manifest is None:
        parts.append(_missing(run, "There is no token store.", "prepare"))
    else:
        tokenizer = run.manifest.get("tokenizer", {})
        facts = [
            ("tokenizer", f"{tokenizer.get('kind', '')}, {format_count(tokenizer.get('vocab_size'))} tokens"),
            ("lossless", ("yes" if tokenizer["lossless"] else "no") if "lossless" in tokenizer else None),
            ("Python", run.manifest.get("python")),
            ("corpus sha256", str(run.manifest.get("corpus_sha256") or "")[:16]),
            ("store fingerprint", str(run.manifest.get("fingerprint") or "")[:12]),
        ]
        head = ("Source", "split", "documents", "text bytes", "tokens", "bytes per token")
        parts += [definition_list(facts), table(head, _split_rows(run.manifest), texts=2)]
    if run.data is None:
        parts.append(_missing(run, "There is no data.json, which describes the packing of rows.", "train"))
    else:
        settings = (run.config or {}).get("data", {})
        parts.append("<h3>Rows for training</h3>")
        parts.append(
            definition_list(
                [
                    ("packing", settings.get("packing")),
                    ("tokens in a row", ", ".join(map(format_count, list_row_lengths(run.config or {})))),
                ]
            )
        )
        columns = list(dict.fromkeys(column for source in run.data.values() for column in source))
        rows = [(name, *(_format_value(source.get(column)) for column in columns)) for name, source in run.data.items()]
        parts.append(table(("Source", *(column.replace("_", " ") for column in columns)), rows))
    return section("Data", "".join(parts))


def render_evaluation(run: RunFiles) -> str:
    """The scores of every split at its last evaluated step, by source."""
    rows = []
    for split in filter(run.evals.__contains__, _SPLITS):
        scores = run.last_eval(split) or {}
        lines = dict(scores.get("sources", {}))
        if len(lines) != 1:
            lines["all"] = scores["total"]
        for source, s in lines.items():
            bits = None if s["bits_per_byte"] is None else f"{s['bits_per_byte']:.4f}"
            perplexity = None if s["perplexity"] is None else f"{s['perplexity']:,.2f}"
            accuracy = None if s["accuracy"] is None else f"{s['accuracy']:.2%}"
            scored = (f"{s['loss']:.4f}", perplexity, bits, accuracy)
            rows.append((split, source, scores.get("step"), *scored, s.get("num_targets"), s["documents"]))
    head = ("Split", "source", "step", "loss", "perplexity", "bits per byte", "accuracy", "targets", "documents")
    body = table(head, rows, texts=2) if rows else _missing(run, "Nothing was evaluated yet.", "eval")
    return section("Evaluation", body)


def render_tasks(run: RunFiles) -> str:
    """The scores of tasks; empty without any."""
    return task_scores.render(run.evals)


def render_samples(run: RunFiles) -> str:
    """Prompts and their continuations by the model."""
    if not run.samples:
        text = "No samples yet: training ends with one for each of sample.prompts."
        return section("Samples", _missing(run, text, "train"))
    excerpts = []
    for sample in run.samples:
        text = f"<mark>{escape(sample.get('prompt', ''))}</mark>{escape(sample.get('text', ''))}"
        fields = [f"{name} {_format_value(value)}" for name, value in sample.items() if name not in ("prompt", "text")]
        excerpts.append(excerpt(text, ", ".join(fields)))
    return section("Samples", "".join(excerpts), note="The prompt is coloured.")


def render_config(run: RunFiles) -> str:
    """The resolved config."""
    if run.config is None:
        return section("Config", _missing(run, "There is no config.json.", "train"))
    text = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return section("Config", collapsed("The resolved config", f"<pre>{text}</pre>"))


def render_footer(run: RunFiles) -> str:
    """The source of the numbers, and the files that cannot be read."""
    unreadable = f" Not readable: {', '.join(run.unreadable)}." if run.unreadable else ""
    return f"<footer>All numbers are from the files in {escape(run.workdir)}.{escape(unreadable)}</footer>"


def _plot_metrics(run: RunFiles, plots: Iterable[tuple[str, Any, bool]], marks: list[plot.Mark]) -> str:
    """Plots of (title, points or the name of a metric, whether y starts at 0)."""
    charts = []
    for title, points, from_zero in plots:
        curve = plot.Curve(title, run.curve(points) if isinstance(points, str) else points)
        charts.append((title, plot.draw_curves([curve], label=title, marks=marks, from_zero=from_zero)))
    return chart_grid(charts)


def _make_marks(run: RunFiles) -> list[plot.Mark]:
    """Restarts, and the steps up to which updates were skipped."""
    marks = [
        plot.Mark(restart["step"], f"restart at step {restart['step']:,}, {_format_time(restart['time'])}", "restart")
        for restart in (run.run or {}).get("restarts", [])
    ]
    before = 0.0
    for step, skipped in run.curve("skipped_steps"):
        if skipped > before:
            marks.append(plot.Mark(step, f"{skipped - before:.0f} skipped up to step {step:,.0f}", "skipped"))
        before = skipped
    return marks


def _split_rows(manifest: dict[str, Any]) -> Iterable[tuple]:
    for name, source in manifest.get("sources", {}).items():
        for split in _SPLITS:
            if isinstance(counts := source.get(split), dict):
                per_token = f"{counts['text_bytes'] / counts['tokens']:.2f}" if counts["tokens"] else None
                yield (name, split, counts["documents"], counts["text_bytes"], counts["tokens"], per_token)


def _last_value(run: RunFiles, name: str) -> float | None:
    return next((line[name] for line in reversed(run.metrics) if line.get(name) is not None), None)


def _median(points: list[tuple[float, float]], form: str) -> str | None:
    """The median y of the points in a format such as "{:.1%}"; None without points."""
    return form.format(statistics.median(y for _, y in points)) if points else None


def _format_value(value: Any) -> str:
    """Integers with separators, other numbers with five digits, strings unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return format_count(value) if value == int(value) else f"{value:.5g}"


def _format_time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _missing(run: RunFiles, text: str, command: str) -> str:
    config_file = "" if command == "eval" or run.config else "--config=NAME "  # otherwise config.json has it
    return missing_part(text, f"llmjax {command} {config_file}--workdir={run.workdir}")
