"""When the metrics logger reports that a run diverged."""

import types
from typing import Any

import numpy as np
import pytest

from llmjax.run.config import TrainConfig
from llmjax.train.logger import MetricsLogger


@pytest.fixture
def make_logger(monkeypatch):
    monkeypatch.setattr("llmjax.train.logger.run_config.flops_per_token", lambda *_: 1.0)
    monkeypatch.setattr(MetricsLogger, "_write", lambda *_: None)

    def make(best_loss: float | None = None, **train) -> MetricsLogger:
        context = types.SimpleNamespace(
            config=types.SimpleNamespace(train=TrainConfig(log_every=1, **train)),
            last_step=20,
            teacher=None,
        )
        progress = types.SimpleNamespace(total_targets=0, best_loss=best_loss)
        return MetricsLogger(context, progress)  # pyright: ignore[reportArgumentType]

    return make


PHASE: Any = types.SimpleNamespace(
    phase=types.SimpleNamespace(config=None), objective=types.SimpleNamespace(target_len=1)
)


def record(logger: MetricsLogger, losses: list[float]) -> MetricsLogger:
    for step, loss in enumerate(losses, 1):
        counts = {"num_targets": np.array(1), "num_tokens": np.array(1)}
        logger.record(step, {"finite": np.isfinite(loss), "loss": np.array(loss), **counts}, PHASE)
    logger.flush()
    return logger


@pytest.mark.parametrize("max_skipped", [1, 3])
@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_diverged_is_set_after_max_skipped_bad_steps_and_stays_set(make_logger, max_skipped, bad):
    """A step is read after the next one was started, so the loop asks only after a good step may have been read."""
    logger = record(make_logger(max_skipped=max_skipped), [5.0] * 3 + [np.nan] * bad + [5.0] * 4)
    assert logger.diverged == (bad >= max_skipped)


def test_a_loss_far_above_the_best_median_is_bad_wherever_the_run_was_interrupted(make_logger):
    falling = [8 - 0.1 * step for step in range(40)]  # medians of 32 steps down to 5.65, or 5.55 with the next
    logger = record(make_logger(max_skipped=3), [*falling, 1.0])
    best = logger.best_loss
    assert best == pytest.approx(5.55)
    assert not record(logger, [8.5] * 99).diverged
    assert not record(make_logger(best, max_skipped=3), [8.8, 8.8, 5.0, 8.8]).diverged
    assert record(make_logger(best, max_skipped=3), [8.8, np.nan, 8.8]).diverged
    assert not record(make_logger(best, max_skipped=3, max_loss_rise=0.0), [9e9] * 9).diverged
    assert not record(make_logger(max_skipped=3), [5.0] * 20 + [9.0] * 11).diverged  # there is no median yet
