"""Metrics of a training run: metrics.jsonl, sinks such as TensorBoard, the console line, and MFU.

A line of metrics.jsonl is one JSON object. Means and rates cover the steps since the line before it.

step               optimizer steps done
loss               mean nats per scored token of this step, the float32 value exactly
z_loss             what train.z_loss adds to it, likewise a mean
accuracy           share of scored tokens whose target got the highest score
batch_digest       uint32 hash of the global batch's rows, samples and tokens; the same on any mesh
tokens             scored target tokens since step 0
tokens_per_second  scored target tokens, on all devices
step_seconds       wall time of a step
data_wait_seconds  the part of it that waited for a batch
learning_rate, grad_norm
skipped_steps      steps since step 0 whose update was not finite and was left out
load_balance_loss, router_z, max_expert_load, unused_expert_fraction  of mixtures of experts, see nn.moe.losses
mfu                useful FLOPs over the devices' peak, or null where the peak is unknown

NaN and the infinities are written as Python's json spells them: a loss that broke must not read as one that is absent.
"""

from collections.abc import Mapping
import json
import math
import pathlib
import shutil
import sys
import time
from typing import Any, Protocol, TextIO

from etils import epath

from llmjax import atomic
from llmjax.errors import UserError
from llmjax.run import workdir as workdirs

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip's two TensorCores are two JAX devices; v4 and v5p join theirs to one
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs a second of one JAX device by `jax.Device.device_kind`; None where unknown, as for a CPU.

    TPU figures are those of Google Cloud's page of each generation; GPU figures those of NVIDIA's data sheets without
    sparsity. A TPU's kind must match whole, a GPU's may say more ("NVIDIA A100-SXM4-80GB"), but a MIG slice is unknown.
    """
    if device_kind.startswith("TPU"):
        return PEAK_FLOPS.get(device_kind)
    words = set(device_kind.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for kind, peak in PEAK_FLOPS.items() if set(kind.split()) <= words), None)


def mfu(*, flops_per_token: float, tokens_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1, of tokens that are no padding. None where the peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * num_devices)


def read_metrics(workdir: epath.PathLike, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run in order of steps, up to `last_step`; [] where there is no file.

    A torn line is dropped. A line whose step is not above its predecessors' replaces them from that step on: it was
    written after a restart. Raises UserError where the file cannot be read.
    """
    path = epath.Path(workdir) / workdirs.METRICS
    kept: list[dict[str, Any]] = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return kept
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore or remove it") from error
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            continue
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return [record for record in kept if last_step is None or record["step"] <= last_step]


class ScalarSink(Protocol):
    """Where scalars go beside metrics.jsonl: TensorBoard events, Weights & Biases."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """metrics.jsonl and TensorBoard events (WORKDIR/events) of one run, written by the primary process alone.

    Opening at `resume_step` drops what a killed run wrote beyond it. On a disk each line is appended and flushed; in an
    object store the whole file is written again every `rewrite_seconds`, at `flush()` and at `close()`, and there are
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
        """Log one step. Values are numbers, texts, None, or arrays of one element; "step" must exceed the last one."""
        if not self._primary:
            return
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
        step = plain["step"]
        assert step > self._last_step, f"step {step} is logged after step {self._last_step}"
        self._last_step = step
        if self._file:
            if not self._file.is_in_place():
                raise UserError(
                    f"{self._path} was removed, renamed or replaced while this run was writing to it; stopped. Put it "
                    "back and rerun the same command to resume"
                )
            self._file.write(_line(plain).encode())
        else:
            self._lines.append(_line(plain))
            if time.monotonic() - self._rewritten >= self._rewrite_seconds:
                self._rewrite()
        names = plain.keys() - {"step", "batch_digest"}
        self.scalars(step, {f"train/{name}": plain[name] for name in sorted(names)})

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers for the sinks alone, such as an evaluation's; what is not a number is left out."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.log(step, numbers)

    def add_sink(self, sink: ScalarSink) -> None:
        """Give every scalar from now on to `sink` as well, and close it with the log."""
        self._sinks.append(sink)

    def flush(self) -> None:
        """Put every line written so far where a resumed run will find it."""
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


class Console:
    """One progress line that is redrawn in place on a terminal, and plain lines elsewhere; `steps` is where the run
    ends."""

    def __init__(self, steps: int, *, primary: bool = True, stream: TextIO | None = None, clock=time.monotonic):
        self._steps = steps
        self._primary = primary
        self._stream = stream or sys.stdout
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._drawn = False
        self._previous: tuple[int, float] | None = None
        self._seconds_per_step: float | None = None

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a line of the metrics with the time that is left."""
        if not self._primary:
            return
        text = progress_line(record, self._steps, self._seconds_left(record))
        if self._terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r\x1b[K{text}")
            self._drawn = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A message of its own, above the progress line."""
        if not self._primary:
            return
        self._stream.write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        self._stream.flush()
        self._drawn = False

    def close(self) -> None:
        """Leave the progress line as it stands."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False

    def _seconds_left(self, record: Mapping[str, Any]) -> float:
        """Wall time a step, evaluations and saves included, smoothed; nan at the first line, which compiled."""
        now, step, recent = self._clock(), int(record["step"]), math.nan
        if self._previous and step > self._previous[0]:
            recent = (now - self._previous[1]) / (step - self._previous[0])
            old = self._seconds_per_step
            self._seconds_per_step = recent if old is None else 0.8 * old + 0.2 * recent
        self._previous = (step, now)
        return (self._seconds_per_step or recent) * max(self._steps - step, 0)


def progress_line(record: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """`step  120/1000  loss 3.412  1,834 tok/s  lr 2.9e-4  grad 1.02  data 0.1%  ETA 4:31`, without what is absent."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    shown = {
        "loss": "loss {:.3f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "learning_rate": "lr {}",
        "grad_norm": "grad {:.2f}",
        "mfu": "mfu {:.1%}",
    }
    for name, form in shown.items():
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
