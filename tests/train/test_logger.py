"""When the metrics logger reports that a run diverged."""

import types

import numpy as np
import pytest

from llmjax.train.logger import MetricsLogger


@pytest.mark.parametrize("max_skipped", [1, 3])
@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_diverged_is_set_after_max_skipped_bad_steps_and_stays_set(monkeypatch, max_skipped, bad):
    """A step is read after the next one was started, so the loop asks only after a good step may have been read."""
    monkeypatch.setattr("llmjax.train.logger.run_config.flops_per_token", lambda *_: 1.0)
    monkeypatch.setattr(MetricsLogger, "_write", lambda *_: None)
    train = types.SimpleNamespace(max_skipped=max_skipped, log_every=1)
    context = types.SimpleNamespace(
        config=types.SimpleNamespace(train=train),
        objective=types.SimpleNamespace(target_len=1),
        last_step=20,
    )
    logger = MetricsLogger(context, types.SimpleNamespace(total_targets=0))  # pyright: ignore[reportArgumentType]
    for step in range(1, 12):
        finite = np.array(not 4 <= step < 4 + bad)
        logger.record(step, {"finite": finite, "num_targets": np.array(1), "num_tokens": np.array(1)})
    logger.flush()
    assert logger.diverged == (bad >= max_skipped)
