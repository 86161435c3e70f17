"""muP: what a few steps do to activations stays as the width grows; under the standard parametrization it does not."""

import dataclasses
import pathlib

import pytest

from llmjax.binding import load_module
from llmjax.errors import UserError
from llmjax.models.base import PARAMETRIZATIONS
from llmjax.models.decoder_config import DecoderConfig
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.optimizer import make_optimizer

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools" / "coord_check.py"


@pytest.fixture(scope="module")
def tool():
    return load_module(TOOL)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["decoder", "encoder", "encdec", "lstm"])
def test_the_coordinate_check(tool, family):
    """From width 64 to 256, logits change 4 times as much under the standard parametrization, and alike under muP."""
    growth = {}
    for name in PARAMETRIZATIONS:
        changes = [
            tool.change_after(tool.FAMILIES[family](width, **tool.COMMON, parametrization=name))["logits"]
            for width in (64, 256)
        ]
        growth[name] = changes[1] / changes[0]
    assert growth["mup"] < 1.6, growth
    assert growth["standard"] > 1.8 * growth["mup"], growth


def test_at_the_base_width_both_are_the_same():
    config = DecoderConfig(embed=256, head_dim=64, num_heads=4)
    mup = dataclasses.replace(config, parametrization="mup")
    assert config.width_multiplier == mup.width_multiplier == 1
    assert mup.mup_score_scale(0.125, 64) == config.mup_score_scale(0.125, 256) == 0.125
    wide = dataclasses.replace(mup, embed=1024, head_dim=256)
    assert wide.width_multiplier == 4 and wide.mup_score_scale(1 / 16, wide.head_size) == 1 / 32


def test_bad_values_are_named():
    with pytest.raises(UserError, match=r"model.parametrization='mupp': .*did you mean 'mup'"):
        DecoderConfig(parametrization="mupp")
    with pytest.raises(UserError, match=r"model.base_embed=0"):
        DecoderConfig(base_embed=0)
    with pytest.raises(UserError, match=r"optimizer.name='sgd': has no muP rule"):
        make_optimizer(OptimizerConfig(name="sgd"), horizon=10, axes={}, width=2.0)
