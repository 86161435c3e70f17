"""The state of a run as text, from the files of its workdir; does not import JAX."""

from collections.abc import Sequence
import dataclasses
import math
import statistics
import textwrap
from typing import Any

from etils import epath

from llmjax.errors import UserError
from llmjax.metrics import duration, progress_line, read_metrics
from llmjax.report import step_plan
from llmjax.run import workdir as workdirs

WIDTH, CURVE_ROWS = 80, 10
RECENT_LINES = 20  # of metrics.jsonl; their median step time predicts the remaining time
SAMPLES, SAMPLE_LINES = 2, 4
_BLOCKS = " \u2581▂▃▄▅▆▇█"  # cells of which 0 to 8 eighths are filled


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The content of the files at one time.

    stop      the step at which training ends; 0 if there is no config.json
    evals     split -> scores of the newest evaluated step; `eval_step` is that step
    plan      of the step, by `llmjax plan --workdir`; None if there is none
    holder    the process in lock.json; None if no process uses the workdir
    """

    workdir: epath.Path
    stop: int
    metrics: list[dict[str, Any]]
    eval_step: int
    evals: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]
    run: dict[str, Any]
    plan: dict[str, Any] | None
    holder: workdirs.Holder | None

    @property
    def step(self) -> int:
        """The last logged step, 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def is_running(self) -> bool:
        """Whether a live process uses the workdir."""
        return self.holder is not None and self.holder.alive


def read(workdir: epath.Path) -> Snapshot:
    """Read the files of a run. Raises UserError if the folder is missing or a file is damaged."""
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder; give the workdir of a run")
    train = (workdirs.read_run_config(workdir) or {}).get("train")
    stops = [train.get("stop_at"), train.get("steps")] if isinstance(train, dict) else []
    steps = [int(path.name) for path in (workdir / workdirs.EVAL).glob("*") if path.name.isdecimal()]
    eval_step = max(steps, default=0)
    evals = {}
    for path in sorted((workdir / workdirs.EVAL / str(eval_step)).glob("*.json")):
        total = (workdirs.read_json(path) or {}).get("total")
        if isinstance(total, dict):
            evals[path.stem] = total
    samples = workdirs.read_json(workdir / workdirs.SAMPLES, list) or []
    return Snapshot(
        workdir=workdir,
        stop=next((stop for stop in stops if type(stop) is int and stop > 0), 0),
        metrics=read_metrics(workdir),
        eval_step=eval_step,
        evals=evals,
        samples=[sample for sample in samples if isinstance(sample, dict)],
        run=workdirs.read_json(workdir / workdirs.RUN) or {},
        plan=workdirs.read_json(workdir / workdirs.PLAN),
        holder=workdirs.read_holder(workdir),
    )


def describe(snapshot: Snapshot, *, width: int = WIDTH) -> list[str]:
    """The snapshot as lines: the run and its state, the last metrics, the loss curve, evaluations, samples."""
    lines = [f"{snapshot.workdir.name}: {describe_status(snapshot)}"]
    if not snapshot.metrics:
        return [*lines, "no step was logged yet"]
    if _is_number(snapshot.run.get("parameters")) and "device" in snapshot.run:
        devices = f"{snapshot.run.get('num_devices', 1)} x {snapshot.run['device']}"
        lines.append(f"{snapshot.run['parameters']:,} parameters, {devices}")
    last = {name: value for name, value in snapshot.metrics[-1].items() if _is_number(value)}
    lines += [progress_line(last, snapshot.stop or snapshot.step, predict_remaining_seconds(snapshot)), ""]
    losses = [(line["step"], float(line["loss"])) for line in snapshot.metrics if _is_number(line.get("loss"))]
    lines += ["training loss, nats per token", *draw_curve(losses, width=width)]
    if snapshot.plan is not None:
        lines += ["", *step_plan.describe(snapshot.plan, snapshot.metrics)]
    if snapshot.evals:
        lines += ["", f"evaluation at step {snapshot.eval_step}"]
        lines += [f"  {split}: {_format_scores(total)}" for split, total in snapshot.evals.items()]
    if snapshot.samples:
        lines += ["", f"samples at step {snapshot.samples[0].get('step', '?')}"]
        for sample in snapshot.samples[:SAMPLES]:
            lines += _format_sample(sample, width)
    return lines


def describe_status(snapshot: Snapshot) -> str:
    """Whether the run is running, finished or stopped, and at which step."""
    holder = snapshot.holder
    if holder is None:
        if snapshot.stop and snapshot.step >= snapshot.stop:
            return "finished"
        return f"not running, stopped at step {snapshot.step}{f' of {snapshot.stop}' if snapshot.stop else ''}"
    process = f"process {holder.pid} on {holder.host}"
    silent = f"; it has not written lock.json for {duration(holder.silent_seconds)}"
    if not holder.alive:
        return f"not running: {process} ended without releasing the workdir{silent}"
    return f"running: {process}{silent if holder.silent_seconds > workdirs.EXPIRY_SECONDS else ''}"


def predict_remaining_seconds(snapshot: Snapshot) -> float:
    """Seconds to the last step at the recent median time of a step; nan if the run is not running."""
    times = [line["step_seconds"] for line in snapshot.metrics if _is_number(line.get("step_seconds"))]
    if not snapshot.is_running or not times:
        return math.nan
    return statistics.median(times[-RECENT_LINES:]) * max(snapshot.stop - snapshot.step, 0)


def draw_curve(points: Sequence[tuple[int, float]], *, width: int = WIDTH, rows: int = CURVE_ROWS) -> list[str]:
    """A chart of (step, value) points, each column the mean of its steps; values that are not finite are skipped.

    The rows go from the lowest to the highest mean, in eighths of a row.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return ["no finite value"]
    columns = _average_columns(finite, max(width - 11, 8))
    low, high = min(columns), max(columns)
    scale = (8 * rows - 1) / (high - low) if high > low else 0.0
    heights = [1 + round((value - low) * scale) for value in columns]
    lines = []
    for row in reversed(range(rows)):
        label = f"{high:9.4g}" if row == rows - 1 else f"{low:9.4g}" if row == 0 else " " * 9
        lines.append(f"{label} " + "".join(_BLOCKS[min(max(height - 8 * row, 0), 8)] for height in heights).rstrip())
    first, last = f"step {finite[0][0]}", str(finite[-1][0])
    return [*lines, " " * 10 + first + last.rjust(max(len(columns) - len(first), len(last) + 1))]


def _average_columns(points: Sequence[tuple[int, float]], width: int) -> list[float]:
    """Means of the points by column, from the first to the last step; an empty column repeats the previous value."""
    first, last = points[0][0], points[-1][0]
    values: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        values[(step - first) * (width - 1) // max(last - first, 1)].append(value)
    means: list[float] = []
    for column in values:
        means.append(statistics.fmean(column) if column else means[-1])
    return means


def _format_scores(total: dict[str, Any]) -> str:
    forms = {
        "loss": "loss {:.4f}",
        "perplexity": "perplexity {:,.2f}",
        "bits_per_byte": "{:.4f} bits per byte",
        "accuracy": "accuracy {:.2%}",
        "margin": "margin {:.4f}",
        "macro_f1": "macro F1 {:.4f}",
        "pearson": "Pearson {:.4f}",
        "spearman": "Spearman {:.4f}",
    }
    return ", ".join(form.format(total[name]) for name, form in forms.items() if _is_number(total.get(name)))


def _format_sample(sample: dict[str, Any], width: int) -> list[str]:
    """The first lines of a sample, without control characters, which could affect the terminal."""
    text = f"{sample.get('prompt', '')}{sample.get('text', '')}"
    plain = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.replace("\t", "    "))
    lines = [part for line in plain.splitlines() for part in textwrap.wrap(line, max(width - 4, 8)) or [""]]
    cut = [*lines[: SAMPLE_LINES - 1], "..."] if len(lines) > SAMPLE_LINES else lines
    return [f"  | {line}".rstrip() for line in cut]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
