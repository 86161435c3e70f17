"""Metrics and timings of a running job. Step n is read after step n + 1 was started, so the device never waits."""

import collections
from collections.abc import Iterator
import contextlib
import logging
import statistics
import time
from typing import Any

import jax

from llmjax.evals import harness
from llmjax.metrics import ProgressLine, mfu
from llmjax.run import config as run_config
from llmjax.run.teacher import teacher_flops_per_token
from llmjax.train.context import Progress, TrainContext
from llmjax.train.phases import TrainPhase

logger = logging.getLogger(__name__)

_LOSS_WINDOW = 32  # steps of whose losses the median is taken


class MetricsLogger:
    """Reads the metrics and times of each step; every `train.log_every` steps it writes a line of metrics.jsonl.

    total_targets   scored targets since step 0
    best_loss       the lowest median of the losses of some steps in a row; None before there were as many steps
    diverged        `train.max_skipped` steps in a row were bad: not finite, or with a loss of more than
                    `train.max_loss_rise` above `best_loss`. It is never reset, since a step is read one step late
    """

    def __init__(self, context: TrainContext, progress: Progress):
        self._context = context
        self._progress_line = ProgressLine(context.last_step)
        self._pending: tuple[int, dict, float] | None = None
        self._bad_in_a_row = 0
        self._first = True
        self._losses: collections.deque[float] = collections.deque(maxlen=_LOSS_WINDOW)
        self.total_targets, self.best_loss, self.diverged = progress.total_targets, progress.best_loss, False
        self._restart_window()

    def _restart_window(self) -> None:
        """Rates and times of a line cover the steps since the previous line, which are the window."""
        self._began, self._data_wait, self._steps = time.monotonic(), 0.0, 0
        self._window_targets = self._window_flops = 0

    @contextlib.contextmanager
    def data_timer(self) -> Iterator[None]:
        """Inside, the time counts as waiting for data."""
        began = time.monotonic()
        yield
        self._data_wait += time.monotonic() - began

    def record(self, step: int, metrics: dict[str, jax.Array], phase: TrainPhase) -> None:
        """Remember that `step` was started, in this phase, and read the metrics of the step before it."""
        self.flush()
        self._pending = step, metrics, self._flops_per_token(phase)

    def flush(self) -> None:
        """Wait for the running step and read its metrics."""
        if self._pending is None:
            return
        (step, arrays, flops_per_token), self._pending = self._pending, None
        read = ("finite", "loss", "num_targets", "num_tokens")
        finite, loss, targets, tokens = jax.device_get([arrays[name] for name in read])
        self._watch_loss(step, finite, loss.item())
        self.total_targets += int(targets)
        self._window_targets += int(targets)
        self._window_flops += int(tokens) * flops_per_token
        self._steps += 1
        logged = step % self._context.config.train.log_every == 0 or step == self._context.last_step
        # The first step is printed at once, and its compilation does not count in the times of later steps.
        if logged or self._first:
            values = {name: value.item() for name, value in jax.device_get(arrays).items() if name != "finite"}
            self._write(step, values | {"num_targets": int(targets)}, logged)
        self._first = False

    def _flops_per_token(self, phase: TrainPhase) -> float:
        """Model FLOPs of a token, which costs the same whether it is scored or not."""
        config, target_len, teacher = phase.phase.config, phase.objective.target_len, self._context.teacher
        of_teacher = 0.0 if teacher is None else teacher_flops_per_token(config, teacher.config, target_len)
        return run_config.flops_per_token(config, target_len) + of_teacher

    def _watch_loss(self, step: int, finite: bool, loss: float) -> None:
        """Count bad steps in a row. Their losses are not taken into the median."""
        train, best = self._context.config.train, self.best_loss
        if finite and (best is None or not train.max_loss_rise or loss <= best + train.max_loss_rise):
            self._bad_in_a_row = 0
            self._losses.append(loss)
            if len(self._losses) == _LOSS_WINDOW:
                median = statistics.median(self._losses)
                self.best_loss = median if best is None else min(best, median)
            return
        if not self._bad_in_a_row:
            logger.info("step %d: its loss is %s", step, f"{loss:.4f} after {best:.4f}" if finite else "not finite")
        self._bad_in_a_row += 1
        self.diverged |= self._bad_in_a_row >= train.max_skipped

    def _write(self, step: int, values: dict[str, Any], logged: bool) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        record = {
            "step": step,
            "time": time.time(),
            **values,
            "total_targets": self.total_targets,
            "tokens_per_second": self._window_targets / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait_seconds": self._data_wait / self._steps,
            "mfu": mfu(
                flops_per_second=self._window_flops / seconds,
                device_kind=jax.devices()[0].device_kind,
                num_devices=jax.device_count(),
            ),
        }
        if logged:
            self._context.lock.check()
            self._context.log.write(record)
        self._progress_line.update(record)
        self._restart_window()

    def log_eval(self, scores: dict[str, Any]) -> None:
        """Log the scores of an evaluation, whose time does not count in the times of steps."""
        logger.info("  %s: %s", scores["split"], harness.format_scores(scores["total"]))
        self._restart_window()
