"""The report of a training run: scores, curves, speed, configuration, data, samples."""

from collections.abc import Iterable
import datetime
import json
import math
import statistics
from typing import Any

from etils import epath

from llmjax.metrics import duration
from llmjax.report import plot
from llmjax.report.files import RunFiles, compressors, read
from llmjax.report.markup import clean, count, figure, missing, page, pairs, section, table
from llmjax.run import workdir as workdirs

MARKS = {"restart": "restarted", "skipped": "steps skipped, not finite"}
SPLITS = ("train", "validation", "test")
OPERATIONS = 15  # rows of the profile's table
SMOOTHED_FROM = 100  # number of points from which a curve is smoothed, over one point in as many


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Write WORKDIR/report.html from the run's files and return its path; a part whose files are missing says so."""
    run = read(workdir)
    parts = (header, headline, learning, speed, profile, summary, data, evaluation, samples, config, footer)
    path = run.workdir / workdirs.REPORT
    path.write_text(page(f"{run.workdir.name}: training report", "\n".join(part(run) for part in parts)))
    return path


def header(run: RunFiles) -> str:
    """Name of the run, progress, size, devices and start."""
    about = run.run or {}
    facts = [
        f"step {count(run.metrics[-1]['step'])} of {count(_steps(run))}" if run.metrics and _steps(run) else None,
        f"{figure(about['parameters'])} parameters" if "parameters" in about else None,
        f"{about['num_devices']} x {about['device']}" if "device" in about and "num_devices" in about else None,
        f"started {_moment(about['started'])}" if "started" in about else None,
    ]
    return f"<header><h1>{clean(run.workdir.name)}</h1><p>{clean(' · '.join(filter(None, facts)))}</p></header>"


def headline(run: RunFiles) -> str:
    """Scores of the validation split, compared with compressors or with the majority-class baseline."""
    scores = run.last_eval("validation")
    if scores is None:
        return section("Validation", missing("No evaluation of the validation split yet.", _command("eval", run)))
    total = scores["total"]
    bits = total["bits_per_byte"]
    facts = [
        (f"{total['accuracy']:.2%}", "accuracy") if bits is None else (f"{bits:.4f}", "bits per byte"),
        (f"{total['loss']:.4f}", "loss, nats per token"),
        (f"{total['perplexity']:,.2f}", "perplexity"),
    ]
    facts_html = "".join(
        f'<div class="fact"><div class="big">{value}</div><div class="what">{what}</div></div>' for value, what in facts
    )
    if bits is None:
        rows = [plot.Bar("this model", 100 * total["accuracy"], highlight=True)]
        rows.append(plot.Bar("majority-class baseline", 100 * total["baseline_accuracy"]))
        title, bars = "Accuracy, higher is better", plot.bars(rows, label="Accuracy", unit="%")
    else:
        rows = [plot.Bar("this model", bits, highlight=True)]
        rows += [plot.Bar(name, 8 * size / total["text_bytes"]) for name, size in compressors(run.manifest)]
        title, bars = "Bits per byte, lower is better", plot.bars(rows, label="Compression", unit="bits per byte")
    chart = f"<div><h3>{title}</h3>{bars}</div>"
    note = (
        f"{scores.get('parameters', 'parameters')} at step {count(scores.get('step'))}, "
        f"{count(total['documents'])} documents, {count(total['text_bytes'])} bytes"
    )
    lossy = f'<p class="note">{clean(scores["note"])}</p>' if scores.get("note") else ""
    return section(
        "Validation", f'<div class="hero"><div class="facts">{facts_html}</div>{chart}</div>{lossy}', note=note
    )


def learning(run: RunFiles) -> str:
    """Loss of training and validation, learning rate and gradient norm."""
    title = "Learning"
    if not run.metrics:
        return section(title, missing("No step was logged yet.", _command("train", run)))
    marks, loss = _marks(run), run.curve("loss")
    if len(loss) > SMOOTHED_FROM:
        curves = [plot.Curve("training loss", loss, "faint"), plot.Curve("training loss, smoothed", _smooth(loss))]
        keys = [("faint", "training, each logged step"), ("line", "training, smoothed")]
    else:
        curves, keys = [plot.Curve("training loss", loss)], [("line", "training, each logged step")]
    if validation := [
        (step, scores["total"]["loss"]) for step, scores in sorted(run.evals.get("validation", {}).items())
    ]:
        curves.append(plot.Curve("validation loss", validation, "dots"))
        keys.append(("dots", "validation"))
    keys += [(kind, name) for kind, name in MARKS.items() if any(mark.kind == kind for mark in marks)]
    legend = "".join(f'<li class="{look}"><i></i>{clean(name)}</li>' for look, name in keys)
    big = plot.curves(curves, label="Loss", marks=marks, width=980, height=320)
    small = _small_plots(run, [("Learning rate", "learning_rate", True), ("Gradient norm", "grad_norm", False)], marks)
    body = f'<h3>Loss, nats per token</h3>{big}<ul class="legend">{legend}</ul>{small}'
    return section(title, body, note="Hover over a mark or a dot for its step and value.")


def speed(run: RunFiles) -> str:
    """Tokens per second and time spent waiting for data, over steps; MFU if the device's peak is known."""
    if not run.metrics:
        return ""
    waits = dict(run.curve("data_wait_seconds"))
    steps = run.curve("step_seconds")
    shares = [(step, 100 * waits[step] / seconds) for step, seconds in steps if seconds and step in waits]
    facts = pairs(
        [
            ("time in steps", duration(_step_time(run)) if steps else None),
            ("targets scored", count(_last(run, "total_targets"))),
            ("median tokens per second", _median(run.curve("tokens_per_second"))),
            ("median time of a step", f"{statistics.median(y for _, y in steps):.4g} s" if steps else None),
            ("waiting for data, median", f"{statistics.median(y for _, y in shares):.2g}%" if shares else None),
            ("median MFU", _percent(run.curve("mfu"))),
        ]
    )
    plots = [("Tokens per second", "tokens_per_second", True), ("Wait for data, % of a step", shares, True)]
    if run.curve("mfu"):
        plots.append(("MFU, %", [(step, 100 * y) for step, y in run.curve("mfu")], True))
    return section("Speed", facts + _small_plots(run, plots, _marks(run)))


def profile(run: RunFiles) -> str:
    """The operations of the profiler's trace that take the most time; empty if there is no trace."""
    if run.profile is None:
        return ""
    total = run.profile.seconds
    rows = [
        (operation.name, f"{1e3 * operation.seconds:,.3f}", f"{operation.seconds / (total or 1):.1%}", operation.count)
        for operation in run.profile.operations[:OPERATIONS]
    ]
    body = table(("Operation", "time, ms", "share", "count"), rows)
    note = (
        f"{count(len(run.profile.operations))} operations took {1e3 * total:,.1f} ms, summed over devices and threads; "
        "the time of a loop is without its body. "
        f"The whole trace opens at ui.perfetto.dev: {run.profile.path}"
    )
    return section("Profile", body, note=note)


def summary(run: RunFiles) -> str:
    """Devices, mesh, parameters, optimizer and versions of the run."""
    about = run.run
    if about is None:
        return section("Run", missing("There is no run.json.", _command("train", run)))
    settings = run.config or {}
    batch, seq_len = settings.get("train", {}).get("global_batch"), settings.get("data", {}).get("seq_len")
    mesh = " x ".join(f"{axis} {size}" for axis, size in about.get("mesh", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    facts = pairs(
        [
            ("run", about.get("run_id")),
            ("started", _moment(about["started"]) if "started" in about else None),
            ("device", f"{about.get('num_devices', '')} x {about.get('device', '')}"),
            ("processes", about.get("processes")),
            ("mesh", mesh),
            ("compiled by", about.get("backend")),
            ("parameters", count(about.get("parameters"))),
            ("optimizer", about.get("optimizer")),
            ("evaluated", about.get("eval_params")),
            ("rows x tokens a step", f"{batch} x {seq_len}" if batch and seq_len else None),
            ("restarts", count(len(about.get("restarts", [])))),
            ("steps skipped, not finite", count(_last(run, "skipped_steps"))),
            ("versions", versions),
        ]
    )
    total = about.get("parameters") or math.nan
    parts = [(name, count(size), f"{size / total:.1%}") for name, size in about.get("parameters_by_part", {}).items()]
    by_part = table(("Parameters", "count", "share"), parts) if parts else ""
    unsharded = "".join(f"<li>{clean(line)}</li>" for line in about.get("unsharded_params", []))
    if unsharded:
        unsharded = f"<details><summary>Parameters that stay unsharded</summary><ul>{unsharded}</ul></details>"
    return section("Run", facts + by_part + unsharded)


def data(run: RunFiles) -> str:
    """The token store by source and split, and how its documents were packed into rows."""
    parts = []
    if run.manifest is None:
        parts.append(missing("There is no token store.", _command("prepare", run)))
    else:
        tokenizer = run.manifest.get("tokenizer", {})
        facts = [
            ("tokenizer", f"{tokenizer.get('kind', '')}, {count(tokenizer.get('vocab_size'))} tokens"),
            (
                "lossless",
                {True: "yes", False: "no"}.get(bool(tokenizer["lossless"])) if "lossless" in tokenizer else None,
            ),
            ("Python", run.manifest.get("python")),
            ("corpus sha256", str(run.manifest.get("corpus_sha256") or "")[:16]),
            ("store fingerprint", str(run.manifest.get("fingerprint") or "")[:12]),
        ]
        head = ("Source", "split", "documents", "text bytes", "tokens", "bytes per token")
        parts += [pairs(facts), table(head, _splits(run.manifest), texts=2)]
    if run.data is None:
        parts.append(missing("There is no data.json, which says how rows are packed.", _command("train", run)))
    else:
        settings = (run.config or {}).get("data", {})
        parts.append("<h3>Rows for training</h3>")
        parts.append(pairs([("packing", settings.get("packing")), ("tokens in a row", settings.get("seq_len"))]))
        columns = list(dict.fromkeys(column for source in run.data.values() for column in source))
        rows = [(name, *(_value(source.get(column)) for column in columns)) for name, source in run.data.items()]
        parts.append(table(("Source", *(column.replace("_", " ") for column in columns)), rows))
    return section("Data", "".join(parts))


def evaluation(run: RunFiles) -> str:
    """The scores of every split at its last evaluated step, by source."""
    rows = []
    for split in filter(run.evals.__contains__, SPLITS):
        scores = run.last_eval(split) or {}
        lines = dict(scores.get("sources", {}))
        if len(lines) != 1:
            lines["all"] = scores["total"]
        for source, s in lines.items():
            scored = (
                f"{s['loss']:.4f}",
                f"{s['perplexity']:,.2f}",
                figure(None) if s["bits_per_byte"] is None else f"{s['bits_per_byte']:.4f}",
                f"{s['accuracy']:.2%}",
            )
            counts = (count(s.get("num_targets")), count(s["documents"]))
            rows.append((split, source, count(scores.get("step")), *scored, *counts))
    head = ("Split", "source", "step", "loss", "perplexity", "bits per byte", "accuracy", "targets", "documents")
    body = table(head, rows, texts=2) if rows else missing("Nothing was evaluated yet.", _command("eval", run))
    return section("Evaluation", body)


def samples(run: RunFiles) -> str:
    """Prompts and their continuations by the model."""
    if not run.samples:
        return section(
            "Samples",
            missing("No samples yet: training ends with one for each of sample.prompts.", _command("train", run)),
        )
    figures = []
    for sample in run.samples:
        text = f"<mark>{clean(sample.get('prompt', ''))}</mark>{clean(sample.get('text', ''))}"
        fields = [f"{name} {_value(value)}" for name, value in sample.items() if name not in ("prompt", "text")]
        figures.append(f"<figure><pre>{text}</pre><figcaption>{clean(', '.join(fields))}</figcaption></figure>")
    return section("Samples", "".join(figures), note="The prompt is in colour.")


def config(run: RunFiles) -> str:
    """The resolved config, folded."""
    if run.config is None:
        return section("Config", missing("There is no config.json.", _command("train", run)))
    text = clean(json.dumps(run.config, indent=2, ensure_ascii=False))
    return section("Config", f"<details><summary>The resolved config</summary><pre>{text}</pre></details>")


def footer(run: RunFiles) -> str:
    """The source of the numbers, and the files that could not be read."""
    broken = f" Not readable: {', '.join(run.unreadable)}." if run.unreadable else ""
    return f"<footer>Every number is from the files in {clean(run.workdir)}.{clean(broken)}</footer>"


def _small_plots(run: RunFiles, plots: Iterable[tuple[str, Any, bool]], marks: list[plot.Mark]) -> str:
    """Plots of (title, points or the name of a metric, whether y starts at 0)."""
    parts = []
    for title, points, zero in plots:
        curve = plot.Curve(title, run.curve(points) if isinstance(points, str) else points)
        parts.append(f"<div><h3>{clean(title)}</h3>{plot.curves([curve], label=title, marks=marks, zero=zero)}</div>")
    return f'<div class="plots">{"".join(parts)}</div>'


def _marks(run: RunFiles) -> list[plot.Mark]:
    """Restarts, and the steps up to which updates were skipped."""
    marks = [
        plot.Mark(restart["step"], f"restart at step {restart['step']:,}, {_moment(restart['time'])}", "restart")
        for restart in (run.run or {}).get("restarts", [])
    ]
    before = 0.0
    for step, skipped in run.curve("skipped_steps"):
        if skipped > before:
            marks.append(plot.Mark(step, f"{skipped - before:.0f} skipped up to step {step:,.0f}", "skipped"))
        before = skipped
    return marks


def _splits(manifest: dict[str, Any]) -> Iterable[tuple]:
    for name, source in manifest.get("sources", {}).items():
        for split in SPLITS:
            if isinstance(counts := source.get(split), dict):
                per_token = f"{counts['text_bytes'] / counts['tokens']:.2f}" if counts["tokens"] else figure(None)
                numbers = (count(counts[field]) for field in ("documents", "text_bytes", "tokens"))
                yield (name, split, *numbers, per_token)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return plot.smooth(points, len(points) / SMOOTHED_FROM)


def _step_time(run: RunFiles) -> float:
    """Seconds in steps: the mean of each line times the steps since the line before it."""
    before, total = 0, 0.0
    for step, seconds in run.curve("step_seconds"):
        total += seconds * (step - before)
        before = step
    return total


def _steps(run: RunFiles) -> int | None:
    return (run.config or {}).get("train", {}).get("steps")


def _last(run: RunFiles, name: str) -> float | None:
    return next((line[name] for line in reversed(run.metrics) if line.get(name) is not None), None)


def _median(points: list[tuple[float, float]]) -> str | None:
    return count(statistics.median(y for _, y in points)) if points else None


def _percent(points: list[tuple[float, float]]) -> str | None:
    return f"{statistics.median(y for _, y in points):.1%}" if points else None


def _value(value: Any) -> str:
    """Format a value of a file: integers with separators, fractions with five digits, strings unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return count(value) if value == int(value) else f"{value:.5g}"


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _command(name: str, run: RunFiles) -> str:
    config_file = "" if name == "eval" or run.config else "--config=NAME "  # otherwise config.json has it
    return f"llmjax {name} {config_file}--workdir={run.workdir}"
