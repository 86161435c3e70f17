"""Metrics and timings of a running job. Step n is read once step n + 1 runs, so the device never waits."""

from collections.abc import Iterator
import contextlib
import time
from typing import Any

import jax

from llmjax.metrics import Console, mfu
from llmjax.parallel import hosts
from llmjax.run import config as run_config
from llmjax.train.context import Progress, TrainContext


class MetricsLogger:
    """Collects what each step gave and what it cost; every `train.log_every` steps a line goes to the log.

    tokens     scored targets since step 0
    diverged   `train.max_skipped` steps in a row were not finite; stays so, as a step is read one step late
    """

    def __init__(self, context: TrainContext, stop: int, progress: Progress):
        self._context, self._stop = context, stop
        self._console = Console(stop, primary=hosts.is_primary())
        self._flops = run_config.flops_per_token(context.config, context.evaluator.objective.target_len)
        self._pending: tuple[int, dict] | None = None
        self._bad_in_a_row = 0
        self._first = True
        self.tokens, self.diverged = progress.tokens, False
        self._restart_window()

    def _restart_window(self) -> None:
        self._began, self._wait, self._steps = time.monotonic(), 0.0, 0
        self._window_tokens = self._window_read = 0

    @contextlib.contextmanager
    def data_timer(self) -> Iterator[None]:
        """Time spent inside is time that waited for data."""
        began = time.monotonic()
        yield
        self._wait += time.monotonic() - began

    def record(self, step: int, metrics: dict) -> None:
        """Step `step` was started; the one before it is read."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Read the step that is under way, which waits for it."""
        if self._pending is None:
            return
        (step, arrays), self._pending = self._pending, None
        finite, tokens, read = jax.device_get((arrays["finite"], arrays["tokens"], arrays["read"]))
        self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
        self.diverged |= self._bad_in_a_row >= self._context.config.train.max_skipped
        self.tokens += int(tokens)
        self._window_tokens += int(tokens)
        self._window_read += int(read)
        self._steps += 1
        logged = step % self._context.config.train.log_every == 0 or step == self._stop
        # The first step is shown at once, and its compilation kept out of the times of those that follow.
        if logged or self._first:
            values = {
                name: value.item() for name, value in jax.device_get(arrays).items() if name not in ("finite", "read")
            }
            self._line(step, values, logged)
        self._first = False

    def _line(self, step: int, values: dict[str, Any], logged: bool) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._window_tokens / seconds
        device = jax.devices()[0]
        record = {
            "step": step,
            **values,
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "step_seconds": seconds / self._steps,
            "data_wait_seconds": self._wait / self._steps,
            "mfu": mfu(
                flops_per_token=self._flops,
                tokens_per_second=self._window_read / seconds,  # what is read costs, scored or not
                device_kind=device.device_kind,
                num_devices=jax.device_count(),
            ),
        }
        if logged:
            self._context.lock.check()
            self._context.log.write(record)
        self._console.update(record)
        self._restart_window()

    def log_eval(self, scores: dict[str, Any]) -> None:
        """Show an evaluation; its time is no step's."""
        total = scores["total"]
        more = f"accuracy {total['accuracy']:.2%}"
        if total["bits_per_byte"] is not None:
            more = f"{total['bits_per_byte']:.4f} bits per byte"
        self._console.say(
            f"  {scores['split']}: loss {total['loss']:.4f}, perplexity {total['perplexity']:.2f}, {more}"
        )
        self._restart_window()

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        self._console.say(text)

    def close(self) -> None:
        """Leave the console as it stands."""
        self._console.close()
