"""Learning rate schedules: functions of the optimizer's update count, which skipped steps do not advance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmjax.errors import UserError
from llmjax.optim.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, horizon: int, first: int = 0) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """count -> learning rate. Update `count` (from 0) of a warmup of w steps runs at (count + 1) / (w + 1) of the peak.

    So no update has rate 0, update w is the first at the peak, and count = horizon gives the end. Beyond the horizon
    the rate stays there.

    first   updates before the schedule, where it is that of a later phase; skipped steps may have left fewer

    Raises UserError if the warmup (with wsd, also the decay) does not fit into the horizon.
    """
    resolved = config.resolved()
    peak, warmup = resolved.learning_rate, _warmup_steps(resolved, horizon)
    after = _after_warmup(resolved, horizon, warmup)
    if warmup == 0:
        schedule = after
    else:
        schedule = optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])
    if first:
        return lambda count: jnp.asarray(schedule(jnp.maximum(count - first, 0)), jnp.float32)
    return lambda count: jnp.asarray(schedule(count), jnp.float32)


def _warmup_steps(config: OptimizerConfig, horizon: int) -> int:
    warmup = min(2_000, horizon // 10) if config.warmup_steps is None else config.warmup_steps
    if warmup >= horizon:
        raise UserError(f"optimizer.warmup_steps={warmup}: must be below the {horizon} steps of the schedule; lower it")
    return warmup


def _after_warmup(config: Any, horizon: int, warmup: int) -> optax.Schedule:
    """The schedule after the warmup: count 0 is the first update at the peak."""
    peak, end, span = config.learning_rate, config.end_fraction, horizon - warmup
    match config.schedule:
        case "cosine":
            return optax.cosine_decay_schedule(peak, span, alpha=end)
        case "linear":
            return optax.linear_schedule(peak, end * peak, span)
        case "wsd":
            decay = max(1, round(config.decay_fraction * horizon))
            if decay > span:
                raise UserError(
                    f"optimizer.decay_fraction={config.decay_fraction}: {decay} steps of decay and {warmup} of warmup "
                    f"don't fit in the {horizon} steps of the schedule; lower one of them"
                )
            return optax.linear_schedule(peak, end * peak, decay, transition_begin=span - decay)
        case "inverse_sqrt":
            scale = max(1, warmup)
            return lambda count: peak * jnp.maximum(end, jnp.sqrt(scale / jnp.maximum(scale, count + warmup)))
        case _:
            return optax.constant_schedule(peak)


def describe_change(config: OptimizerConfig, old_horizon: int, new_horizon: int, count: int) -> str:
    """One line: how the learning rate changes if a run at update `count` continues with another horizon."""
    old, new = make_schedule(config, old_horizon), make_schedule(config, new_horizon)
    return (
        f"train.steps {old_horizon} -> {new_horizon}: at update {count} the learning rate goes from {old(count):.3g} "
        f"to {new(count):.3g}; it would have ended at {old(old_horizon):.3g} and now ends at {new(new_horizon):.3g} "
        f"({config.resolved().schedule})"
    )
