"""Metrics and timings of a running job. Step n is read after step n + 1 was started, so the device never waits."""

from collections.abc import Iterator
import contextlib
import logging
import time
from typing import Any

import jax

from llmjax.metrics import ProgressLine, mfu
from llmjax.run import config as run_config
from llmjax.train.context import Progress, TrainContext

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Reads the metrics and times of each step; every `train.log_every` steps it writes a line of metrics.jsonl.

    total_targets   scored targets since step 0
    diverged        `train.max_skipped` steps in a row were not finite. It is never reset, since a step is read one
                    step late
    """

    def __init__(self, context: TrainContext, progress: Progress):
        self._context = context
        self._progress_line = ProgressLine(context.last_step)
        self._flops = run_config.flops_per_token(context.config, context.objective.target_len)
        self._pending: tuple[int, dict] | None = None
        self._bad_in_a_row = 0
        self._first = True
        self.total_targets, self.diverged = progress.total_targets, False
        self._restart_window()

    def _restart_window(self) -> None:
        """Rates and times of a line cover the steps since the previous line, which are the window."""
        self._began, self._data_wait, self._steps = time.monotonic(), 0.0, 0
        self._window_targets = self._window_tokens = 0

    @contextlib.contextmanager
    def data_timer(self) -> Iterator[None]:
        """Inside, the time counts as waiting for data."""
        began = time.monotonic()
        yield
        self._data_wait += time.monotonic() - began

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Remember that `step` was started, and read the metrics of the step before it."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Wait for the running step and read its metrics."""
        if self._pending is None:
            return
        (step, arrays), self._pending = self._pending, None
        finite, targets, tokens = jax.device_get((arrays["finite"], arrays["num_targets"], arrays["num_tokens"]))
        self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
        self.diverged |= self._bad_in_a_row >= self._context.config.train.max_skipped
        self.total_targets += int(targets)
        self._window_targets += int(targets)
        self._window_tokens += int(tokens)
        self._steps += 1
        logged = step % self._context.config.train.log_every == 0 or step == self._context.last_step
        # The first step is printed at once, and its compilation does not count in the times of later steps.
        if logged or self._first:
            values = {name: value.item() for name, value in jax.device_get(arrays).items() if name != "finite"}
            self._write(step, values | {"num_targets": int(targets)}, logged)
        self._first = False

    def _write(self, step: int, values: dict[str, Any], logged: bool) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        record = {
            "step": step,
            **values,
            "total_targets": self.total_targets,
            "tokens_per_second": self._window_targets / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait_seconds": self._data_wait / self._steps,
            "mfu": mfu(
                flops_per_token=self._flops,
                tokens_per_second=self._window_tokens / seconds,  # a token costs the same whether it is scored or not
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
        total, bits = scores["total"], scores["total"]["bits_per_byte"]
        quality = f"accuracy {total['accuracy']:.2%}" if bits is None else f"{bits:.4f} bits per byte"
        text = f"loss {total['loss']:.4f}, perplexity {total['perplexity']:.2f}, {quality}"
        logger.info("  %s: %s", scores["split"], text)
        self._restart_window()
