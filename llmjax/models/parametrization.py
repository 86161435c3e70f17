"""How scales follow the width: the standard way, or muP, under which a rate that suits a narrow model suits a wide one.

muP (Yang et al., 2022, arXiv 2203.03466): every activation moves by as much in a step at any width. Beside the usual
initial variance of 1 / fan-in, that takes three things: logits divided by the width (`width`, here, over the base), a
smaller learning rate for hidden matrices (optim.optimizer.WIDTH_POWERS), and attention scores divided by head_dim where
the standard divides by its root (`score_scale`). All widths are taken to grow with `model.embed`.
"""

from typing import Any

from llmjax.errors import UserError, suggest

NAMES = ("standard", "mup")
_HEAD_DIM = 64  # at which muP's scores are scaled as the standard ones


def check(config: Any) -> None:
    """UserError for an unknown parametrization, or a base width that means nothing."""
    if config.parametrization not in NAMES:
        near = suggest(config.parametrization, NAMES)
        raise UserError(f"model.parametrization={config.parametrization!r}: choose one of {', '.join(NAMES)}{near}")
    if config.base_embed < 1:
        raise UserError(f"model.base_embed={config.base_embed}: must be at least 1")


def width(config: Any) -> float:
    """The model's width over the base width under muP, else 1."""
    return config.embed / config.base_embed if config.parametrization == "mup" else 1.0


def score_scale(config: Any, standard: float) -> float:
    """What attention scores are multiplied by, where the standard parametrization has `standard`."""
    if config.parametrization != "mup":
        return standard
    return standard * (_HEAD_DIM / config.head_size) ** 0.5
