"""All optimizers by name: clipping, schedule, weight decay and averaging in one pure update."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmjax.batch import Params
from llmjax.errors import UserError
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.layer_rates import LayerRates, layers_below_top
from llmjax.optim.layerwise import kind, matrix_dims, matrix_view, per_layer, stack_depth
from llmjax.optim.moments import store_moments
from llmjax.optim.schedules import make_schedule

# RMS of an AdamW update in practice. Muon's updates are scaled to it, so that all parameters share one learning rate.
MUON_RMS = 0.2

# muP: the power of the width by which updates of hidden matrices shrink, so that they change activations equally at
# any width. Adam-like updates have the same size in every entry, so their sum over a fan-in grows with the width.
# Updates of Adafactor have an RMS proportional to the matrix's own, 1 / sqrt(fan-in), and those of Muon a spectral norm
# that grows as the root of the width (Yang et al., 2022, arXiv 2203.03466, table 8; Yang et al., 2023, arXiv
# 2310.17813).
WIDTH_POWERS = {"adamw": 1.0, "lion": 1.0, "schedule_free_adamw": 1.0, "muon": 0.5, "adafactor": 0.5}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Pure functions on (params, state); to skip a step, a caller keeps the old pair.

    The state is a dict: "count" (updates so far), "inner" (optax's state) and, if there is an average, "ema".
    has_average   whether `eval_params` reads the state
    """

    learning_rate: Callable[[jax.typing.ArrayLike], jax.Array]
    inner: optax.GradientTransformation
    axes: Params
    clip_norm: float
    ema_decay: float
    expert_bias_update_rate: float
    layer_rates: LayerRates
    eval_params_name: str
    has_average: bool

    def init(self, params: Params) -> dict[str, Any]:
        """The state before the first update. It shares no array with `params`, so both can be donated."""
        state = {"count": jnp.zeros((), jnp.int32), "inner": self.inner.init(params)}
        return state | ({"ema": jax.tree.map(jnp.copy, params)} if self.ema_decay else {})

    def update(
        self, grads: Params, state: dict[str, Any], params: Params, norm: jax.Array | None = None
    ) -> tuple[Params, dict[str, Any], dict[str, jax.Array]]:
        """(params, state, {"learning_rate", "grad_norm"}) after one update; grad_norm is that before clipping.

        norm   of all gradients without those of expert biases, where `grads` are a part of them

        The inner optimizer does not update an expert bias. Its gradient is the load of its expert above the mean, and
        it takes a step of `expert_bias_update_rate` against the sign of that.
        """
        loads = grads  # those of expert biases
        grads = self._map_expert_bias(lambda g: jnp.zeros_like(g), lambda g: g, grads)
        grads = self.layer_rates.mask_gradients(grads, state["count"])
        norm = optax.tree.norm(grads) if norm is None else norm
        if self.clip_norm:
            grads = optax.tree.scale(jnp.minimum(1.0, self.clip_norm / norm), grads)
        updates: Any
        updates, inner = self.inner.update(grads, state["inner"], params)
        updates = self.layer_rates.scale_updates(updates, state["count"])
        updates = self._map_expert_bias(
            lambda _, load: -self.expert_bias_update_rate * jnp.sign(load), lambda u, _: u, updates, loads
        )
        new_params: Any = optax.apply_updates(params, updates)
        new = {"count": state["count"] + 1, "inner": inner}
        if self.ema_decay:
            # A plain mean at the start, so that the initial parameters have no weight in it.
            weight = jnp.maximum(1 - self.ema_decay, 1 / new["count"])
            new["ema"] = optax.incremental_update(new_params, state["ema"], weight)
        return new_params, new, {"learning_rate": self.learning_rate(state["count"]), "grad_norm": norm}

    def eval_params(self, params: Params, state: dict[str, Any]) -> dict[str, Any]:
        """The parameters to evaluate, sample from and export; `eval_params_name` says which they are."""
        if self.ema_decay:
            return state["ema"]
        if isinstance(state["inner"], optax.contrib.ScheduleFreeState):
            averages: Any = optax.contrib.schedule_free_eval_params(state["inner"], params)
            return self._map_expert_bias(lambda _, param: param, lambda average, _: average, averages, params)
        return params

    def _map_expert_bias(self, expert_bias: Callable, rest: Callable, *trees: Any) -> dict[str, Any]:
        """`expert_bias` applied to the leaves that are expert biases, `rest` to the others."""
        apply = lambda names, *leaves: (expert_bias if kind(names) == "expert_bias" else rest)(*leaves)
        return jax.tree.map(apply, self.axes, *trees, is_leaf=lambda node: isinstance(node, tuple))

    def state_axes(self, shapes: Params) -> Any:
        """Logical axes for every leaf of the state of parameters with these `shapes` (arrays or ShapeDtypeStructs)."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        params = {
            _dict_keys(path): (leaf.shape, names)
            for (path, leaf), names in zip(leaves, structure.flatten_up_to(self.axes), strict=True)
        }

        def axes_of(path, leaf):
            keys = _dict_keys(path)
            owner = next((params[keys[i:]] for i in range(len(keys)) if keys[i:] in params), None)
            return (None,) * leaf.ndim if owner is None else _statistic_axes(str(path[-1]), leaf.shape, *owner)

        return jax.tree_util.tree_map_with_path(axes_of, jax.eval_shape(self.init, shapes))


def _dict_keys(path) -> tuple:
    """The dict keys of a path. The path of a statistic ends with the keys of its parameter."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _statistic_axes(field: str, shape: tuple, param_shape: tuple, param_axes: tuple) -> tuple:
    """Axes of a statistic of a parameter: the parameter's own, those of a factored moment, or only the stacked ones.

    The scales of a quantised moment have the parameter's axes, one of them with the number of blocks.
    """
    if shape == param_shape or field == ".scales":
        return param_axes
    view_shape, view_axes = matrix_view(param_shape, param_axes)
    if shape == view_shape:
        return view_axes
    stack = stack_depth(param_axes)
    if field in (".v_row", ".v_col") and shape[stack:] != (1,):
        # In optax the moment of the rows drops the larger dimension, and that of the columns the smaller one.
        small, large = np.argsort(view_shape[stack:], kind="stable")
        remaining = small if field == ".v_row" else large
        return (*view_axes[:stack], view_axes[stack + remaining])
    return (*param_axes[:stack], *(None,) * (len(shape) - stack))


def make_optimizer(
    config: OptimizerConfig, *, horizon: int, axes: Params, width: float = 1.0, num_layers: int = 0, first: int = 0
) -> Optimizer:
    """The named optimizer over a schedule of `horizon` updates, for parameters with these logical `axes`.

    first       updates before the schedule
    width       the model's width over its base width under muP; 1: the standard parametrization
    num_layers  of the model, for learning rates by layer
    Raises UserError if the schedule does not fit the horizon, or if the optimizer has no muP rule.
    """
    resolved = config.resolved()
    learning_rate = make_schedule(resolved, horizon, first)
    step = optax.chain(_scale_for_width(resolved, axes, width), _decay_and_rate(resolved, axes, learning_rate))
    match resolved.name:
        case "adamw":
            adam = optax.scale_by_adam(resolved.b1, resolved.b2, resolved.eps)
            inner = optax.chain(_store_moments(adam, resolved, axes), step)
        case "lion":
            inner = optax.chain(_store_moments(optax.scale_by_lion(resolved.b1, resolved.b2), resolved, axes), step)
        case "sgd":
            inner = optax.chain(optax.trace(resolved.momentum) if resolved.momentum else optax.identity(), step)
        case "adafactor":
            inner = optax.chain(per_layer(_adafactor(resolved), axes), step)
        case "muon":
            inner = optax.chain(_muon(resolved, axes), step)
        case _:
            inner = _schedule_free(resolved, learning_rate, step)
    is_schedule_free = resolved.name == "schedule_free_adamw"
    name = "EMA of the parameters" if resolved.ema_decay else "parameters"
    return Optimizer(
        learning_rate=learning_rate,
        inner=inner,
        axes=axes,
        clip_norm=resolved.clip_norm,
        ema_decay=resolved.ema_decay,
        expert_bias_update_rate=resolved.expert_bias_update_rate,
        layer_rates=LayerRates(layers_below_top(axes, num_layers), resolved.layer_decay, resolved.unfreeze_every),
        eval_params_name="schedule-free average" if is_schedule_free else name,
        has_average=is_schedule_free or bool(resolved.ema_decay),
    )


def _store_moments(inner: optax.GradientTransformation, config: Any, axes: Params) -> optax.GradientTransformation:
    return inner if config.moment_dtype is None else store_moments(inner, config.moment_dtype, axes)


def _map_axes(function: Callable, axes: Params) -> dict[str, Any]:
    """A tree like the parameters, with the result of `function` for the axes of each."""
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))


def _scale_for_width(config: Any, axes: Params, width: float) -> optax.GradientTransformation:
    """Scale updates of hidden matrices by muP's factor; their weight decay stays the same.

    The fan-in of an adapter's second matrix is its rank, which does not grow with the width.
    """
    if width == 1:
        return optax.identity()
    if config.name not in WIDTH_POWERS:
        raise UserError(
            f"optimizer.name={config.name!r}: has no muP rule; use one of {', '.join(WIDTH_POWERS)}, or "
            "model.parametrization='standard'"
        )
    factor = width ** -WIDTH_POWERS[config.name]
    grows = lambda names: kind(names) == "matrix" and "rank" not in names[: stack_depth(names) + 1]
    factors = _map_axes(lambda names: factor if grows(names) else 1.0, axes)
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def _decay_and_rate(config: Any, axes: Params, learning_rate: Callable) -> optax.GradientTransformation:
    """direction -> -learning_rate * (direction + weight_decay * parameter), the decay on matrices and the head only.

    Tables are not decayed: rows of rare tokens get few gradients, so decay would shrink them.
    """
    decayed = _map_axes(lambda names: kind(names) in ("matrix", "head"), axes)
    decay = optax.add_decayed_weights(config.weight_decay, decayed) if config.weight_decay else optax.identity()
    return optax.chain(decay, optax.scale_by_learning_rate(learning_rate))


def _adafactor(config: Any) -> optax.GradientTransformation:
    """Factored second moments, updates clipped at RMS 1, relative to the parameter's RMS (arXiv 1804.04235)."""
    return optax.chain(
        optax.scale_by_factored_rms(epsilon=config.eps),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _muon(config: Any, axes: Params) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices at the RMS of AdamW (arXiv 2502.16982), AdamW's direction for the rest.

    An orthogonal [input, output] matrix has RMS 1 / sqrt(max(input, output)), hence the scale.
    """

    def dimension_numbers(names):
        dims = matrix_dims(names) if kind(names) == "matrix" else None
        return optax.MaskedNode() if dims is None else optax.contrib.MuonDimensionNumbers(*dims)

    def scale(update, names):
        return MUON_RMS * max(matrix_view(update.shape, names)[0][-2:]) ** 0.5 * update

    numbers = _map_axes(dimension_numbers, axes)
    matrices = _map_axes(lambda names: names if kind(names) == "matrix" else optax.MaskedNode(), axes)
    return optax.partition(
        {
            "muon": optax.chain(
                optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=numbers),
                optax.stateless(lambda updates, _: jax.tree.map(scale, updates, matrices)),
            ),
            "adamw": optax.scale_by_adam(config.b1, config.b2, config.eps),
        },
        _map_axes(lambda names: "muon" if kind(names) == "matrix" else "adamw", axes),
    )


def _schedule_free(
    config: Any, learning_rate: Callable, step: optax.GradientTransformation
) -> optax.GradientTransformation:
    """AdamW whose momentum is replaced by interpolation with an average (arXiv 2405.15682, algorithm 1)."""
    direction = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    # optax counts steps from 1 for this rate and from 0 for the inner optimizer's; both must be the same rate.
    return optax.contrib.schedule_free(
        optax.chain(direction, step), learning_rate=lambda count: learning_rate(count - 1), b1=config.b1
    )
