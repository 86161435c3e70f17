"""Bad optimizer settings are refused in one line that names the field, the value and the fix."""

import pytest

from llmjax.errors import UserError
from llmjax.optim.config import DEFAULTS, OptimizerConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="adamv"), r"optimizer.name='adamv' \(did you mean 'adamw'\?\): choose one of adamw, adafactor"),
        (dict(schedule="cosin"), r"optimizer.schedule='cosin' \(did you mean 'cosine'\?\)"),
        (dict(learning_rate=-1.0), r"optimizer.learning_rate=-1.0: must be above 0"),
        (dict(learning_rate=float("nan")), r"optimizer.learning_rate=nan: must be above 0"),
        (dict(weight_decay=-0.1), r"optimizer.weight_decay=-0.1: must be 0 or more"),
        (dict(clip_norm=-1.0), r"optimizer.clip_norm=-1.0: must be 0 or more"),
        (dict(warmup_steps=-5), r"optimizer.warmup_steps=-5: must be 0 or more"),
        (dict(b2=1.0), r"optimizer.b2=1.0: must be at least 0 and below 1"),
        (dict(end_fraction=1.5), r"optimizer.end_fraction=1.5: must be between 0 and 1"),
        (dict(decay_fraction=0.0), r"optimizer.decay_fraction=0.0: must be above 0 and at most 1"),
        (dict(ema_decay=1.0), r"optimizer.ema_decay=1.0: must be"),
        (dict(momentum=0.9), r"optimizer.momentum=0.9: unused by optimizer.name='adamw'"),
        (dict(name="sgd", b2=0.9), r"optimizer.b2=0.9: unused by optimizer.name='sgd'"),
        (dict(moment_dtype="int4"), r"optimizer.moment_dtype='int4'.*: choose one of float32, bfloat16, int8, or None"),
        (dict(name="muon", moment_dtype="int8"), r"moment_dtype='int8': optimizer.name='muon' .* use adamw or lion"),
        (dict(name="schedule_free_adamw", b1=0.0), r"optimizer.b1=0.0: must be above 0"),
        (dict(name="schedule_free_adamw", ema_decay=0.9), r"optimizer.ema_decay=0.9: .* its own average"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        OptimizerConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_name_alone_sets_every_default(name):
    resolved = OptimizerConfig(name=name).resolved()
    assert all(getattr(resolved, field) == value for field, value in DEFAULTS[name].items())
    assert OptimizerConfig(name=name, learning_rate=0.5).resolved().learning_rate == 0.5
