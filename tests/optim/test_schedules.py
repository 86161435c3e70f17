"""Learning rates at the edges: the first update, the end of the warmup, the horizon and beyond."""

import math

import jax
import pytest

from llmjax.errors import UserError
from llmjax.optim.config import SCHEDULES, OptimizerConfig
from llmjax.optim.schedules import describe_change, make_schedule

PEAK, WARMUP, HORIZON = 0.5, 9, 109


def rates(*counts, horizon=HORIZON, **settings):
    settings = dict(learning_rate=PEAK, warmup_steps=WARMUP, end_fraction=0.1, decay_fraction=0.25) | settings
    schedule = jax.jit(make_schedule(OptimizerConfig(**settings), horizon))
    return [float(schedule(count)) for count in counts]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_linearly_to_the_peak(name):
    first, fifth, last, peak = rates(0, 4, WARMUP - 1, WARMUP, schedule=name)
    assert first == pytest.approx(PEAK / 10)
    assert fifth == pytest.approx(PEAK / 2)
    assert last == pytest.approx(PEAK * 0.9)
    assert peak == pytest.approx(PEAK)
    assert rates(0, schedule=name, warmup_steps=0) == pytest.approx([PEAK])


# Half way between the end of the warmup (9) and the horizon (109) is update 59.
@pytest.mark.parametrize(
    ("name", "half", "end", "beyond"),
    [
        ("cosine", 0.55, 0.1, 0.1),
        ("linear", 0.55, 0.1, 0.1),
        ("wsd", 1.0, 0.1, 0.1),
        ("inverse_sqrt", math.sqrt(9 / 59), math.sqrt(9 / 109), 0.1),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
def test_the_rate_after_warmup_follows_the_schedule(name, half, end, beyond):
    got = rates(59, HORIZON, 100 * HORIZON, schedule=name)
    assert got == pytest.approx([PEAK * half, PEAK * end, PEAK * beyond], rel=1e-5)


def test_cosine_at_a_quarter_of_its_span():
    (quarter,) = rates(34, schedule="cosine")
    assert quarter == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), rel=1e-5)


def test_wsd_decays_in_the_last_quarter_only():
    # A quarter of 109 is 27 steps (rounded), so the decay starts at 82.
    assert rates(82, 83, schedule="wsd") == pytest.approx([PEAK, PEAK * (1 - 0.9 / 27)], rel=1e-5)


def test_default_warmup_fits_any_horizon():
    for horizon in (1, 2, 9, 10):
        assert rates(0, schedule="wsd", warmup_steps=None, horizon=horizon)[0] > 0
    assert rates(1999, 2000, warmup_steps=None, horizon=10**6)[1] == pytest.approx(PEAK)


def test_a_warmup_or_decay_longer_than_the_horizon_is_refused():
    with pytest.raises(UserError, match=r"optimizer.warmup_steps=200: must be below the 109 steps of the schedule"):
        rates(0, warmup_steps=200)
    with pytest.raises(UserError, match=r"optimizer.decay_fraction=0.95: 104 steps of decay and 9 of warmup"):
        rates(0, schedule="wsd", decay_fraction=0.95)


def test_describe_change_names_old_and_new_rates():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="linear", end_fraction=0.0)
    line = describe_change(config, 100, 200, 50)
    assert line == (
        "train.steps 100 -> 200: at update 50 the learning rate goes from 0.5 to 0.75; "
        "it would have ended at 0 and now ends at 0 (linear)"
    )
