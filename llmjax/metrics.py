"""Metrics of a training run: metrics.jsonl, sinks such as TensorBoard, the progress line, and MFU.

A line of metrics.jsonl is one JSON object. Means and rates cover the steps since the line before it.

step               optimizer steps done
loss               mean nats per scored target of this step, the float32 value exactly; with a teacher both of its terms
z_loss             the mean that train.z_loss adds to it
accuracy           share of scored targets that got the highest score
margin             of preferences: the mean of the reward of the chosen answer less that of the rejected one
teacher_kl         of distillation: the mean of KL(teacher || model) at distill.temperature, which `loss` contains
batch_digest       uint32 hash of the global batch's rows, samples and tokens; the same on any mesh
num_targets        scored targets of this step
num_tokens         tokens of this step, scored or not, without padding
total_targets      scored targets since step 0
tokens_per_second  scored targets per second, on all devices
step_seconds       wall time of a step
time               when the line was written, in seconds since 1970
data_wait_seconds  the part of step_seconds that waited for a batch
learning_rate, grad_norm
skipped_steps      steps since step 0 whose update was not finite and was skipped
load_balance_loss, router_z_loss, max_expert_load, unused_expert_fraction
                   of mixtures of experts, see nn.moe.losses
mfu                model FLOPs over the devices' peak FLOPs, or null where the peak is unknown; the forward pass of a
                   teacher counts

NaN and infinities are written as in Python's json, so that a loss that is not finite differs from a missing one.
"""

from collections.abc import Callable, Mapping
import json
import logging
import math
import pathlib
import time
from typing import Any, Protocol

from etils import epath

from llmjax import atomic
from llmjax.errors import UserError
from llmjax.parallel.device_facts import peak_flops
from llmjax.run import workdir as workdirs

logger = logging.getLogger(__name__)


def mfu(*, flops_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1: of `flops_per_second`, without those of padding. None if the peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_second / (peak * num_devices)


def read_metrics(workdir: epath.PathLike, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order of steps, up to `last_step`; [] where there is no file.

    An incomplete line is dropped. A line replaces earlier lines of the same or later steps, since it was written after
    a restart.
    Raises UserError where the file cannot be read.
    """
    path = epath.Path(workdir) / workdirs.METRICS
    records: list[dict[str, Any]] = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return records
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore or remove it") from error
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            continue
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return [record for record in records if last_step is None or record["step"] <= last_step]


class ScalarSink(Protocol):
    """Where scalars are logged in addition to metrics.jsonl: TensorBoard events, Weights & Biases."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one step."""

    def close(self) -> None:
        """Write everything and release the resources."""


class MetricsLog:
    """metrics.jsonl and TensorBoard events (WORKDIR/events) of one run, written by the primary process alone.

    Opening at `resume_step` removes later lines, which a killed run wrote. On a disk each line is appended and flushed;
    in an object store the whole file is rewritten every `rewrite_seconds`, at `flush()` and at `close()`, and there are
    no events. Call `flush()` before a checkpoint is saved, so that a resumed run finds every line up to it.
    """

    def __init__(self, workdir: epath.PathLike, *, primary: bool, resume_step: int = 0, rewrite_seconds: float = 30.0):
        self._path = epath.Path(workdir) / workdirs.METRICS
        self._primary = primary
        self._remote = atomic.is_remote(workdir)
        self._rewrite_seconds = rewrite_seconds
        self._lines: list[str] = []
        self._last_step = -1
        self._file = None
        self._sinks: list[ScalarSink] = []
        if primary:
            self._open(epath.Path(workdir), resume_step)

    def _open(self, workdir: epath.Path, resume_step: int) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        records = read_metrics(workdir, last_step=resume_step)
        self._lines = [_line(record) for record in records]
        self._last_step = records[-1]["step"] if records else -1
        self._rewrite()
        if not self._remote:
            self._lines = []
            self._file = atomic.AppendFile(self._path)
            from llmjax.run.tensorboard import EventFile

            self.add_sink(EventFile(pathlib.Path(workdir) / workdirs.EVENTS, purge_step=resume_step + 1))

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one step. Values are numbers, strings, None, or arrays of one element; "step" must increase."""
        if not self._primary:
            return
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
        step = plain["step"]
        assert step > self._last_step, f"step {step} is logged after step {self._last_step}"
        self._last_step = step
        if self._file:
            if not self._file.still_exists():
                raise UserError(
                    f"{self._path} was removed, renamed or replaced while this run was writing to it; stopped. Put it "
                    "back and rerun the same command to resume"
                )
            self._file.write(_line(plain).encode())
        else:
            self._lines.append(_line(plain))
            if time.monotonic() - self._rewritten >= self._rewrite_seconds:
                self._rewrite()
        names = plain.keys() - {"step", "batch_digest", "time"}
        self.scalars(step, {f"train/{name}": plain[name] for name in sorted(names)})

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log numbers to the sinks alone, such as those of an evaluation; other values are ignored."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.log(step, numbers)

    def add_sink(self, sink: ScalarSink) -> None:
        """Log every later scalar to `sink` as well, and close it with the log."""
        self._sinks.append(sink)

    def flush(self) -> None:
        """Write every line to the disk or object store, where a resumed run finds it."""
        if self._file:
            self._file.sync()
        elif self._primary:
            self._rewrite()

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if not self._primary:
            return
        try:
            self.flush()
        finally:
            for file in (self._file, *self._sinks):
                if file:
                    file.close()
            self._file, self._sinks = None, []
            self._primary = False

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rewrite(self) -> None:
        self._rewritten = time.monotonic()
        atomic.write_bytes(self._path, "".join(self._lines).encode())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


class ProgressLine:
    """Logs a progress line for each line of the metrics, with the time left to step `last_step`."""

    def __init__(self, last_step: int, clock: Callable[[], float] = time.monotonic):
        self._last_step, self._clock = last_step, clock
        self._previous: tuple[int, float] | None = None
        self._seconds_per_step: float | None = None

    def update(self, record: Mapping[str, Any]) -> None:
        """Log one line; the console handler redraws it in place on a terminal."""
        text = progress_line(record, self._last_step, self._seconds_left(int(record["step"])))
        logger.info("%s", text, extra={"progress": True})

    def _seconds_left(self, step: int) -> float:
        """Wall time per step, evaluations and saves included, smoothed; nan at the first line, which compiled."""
        now, recent = self._clock(), math.nan
        if self._previous and step > self._previous[0]:
            recent = (now - self._previous[1]) / (step - self._previous[0])
            old = self._seconds_per_step
            self._seconds_per_step = recent if old is None else 0.8 * old + 0.2 * recent
        self._previous = (step, now)
        return (self._seconds_per_step or recent) * max(self._last_step - step, 0)


def progress_line(record: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """`step  120/1000  loss 3.412  1,834 tok/s  lr 2.9e-4  grad 1.02  data 0.1%  ETA 4:31`, without missing values."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    formats = {
        "loss": "loss {:.3f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "learning_rate": "lr {}",
        "grad_norm": "grad {:.2f}",
        "mfu": "mfu {:.1%}",
    }
    for name, form in formats.items():
        if (value := record.get(name)) is not None:
            parts.append(form.format(short_exponent(float(value)) if name == "learning_rate" else float(value)))
    if record.get("data_wait_seconds") is not None and record.get("step_seconds"):
        parts.append(f"data {float(record['data_wait_seconds']) / float(record['step_seconds']):.1%}")
    if record.get("skipped_steps"):
        parts.append(f"skipped {record['skipped_steps']}")
    if math.isfinite(seconds_left):
        parts.append(f"ETA {duration(seconds_left)}")
    return "  ".join(parts)


def short_exponent(value: float) -> str:
    """0.00029 -> "2.9e-4"."""
    mantissa, exponent = f"{value:.1e}".split("e") if math.isfinite(value) else (str(value), "0")
    return f"{mantissa}e{int(exponent)}" if value and math.isfinite(value) else f"{value:g}"


def duration(seconds: float) -> str:
    """271 -> "4:31", 3725 -> "1:02:05", 90061 -> "1d 01:01:01"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
