"""Learning rates by layer, for fine-tuning: smaller ones for lower layers, and layers that start to train later."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Params
from llmjax.optim.layerwise import LogicalAxes, kind

# Modules before the stack `blocks`, in models whose first layers differ from the others.
_FIRST_LAYERS = ("dense_blocks", "first")


def layers_below_top(axes: Params, num_layers: int) -> Params:
    """For each parameter how many layers it is below the head: a function of its shape.

    0 for the head and the last norm, 1 for the last of n layers, n for the first, n + 1 for embeddings. Stacked
    parameters have an array that broadcasts to their shape. Encoder and decoder are counted separately.
    """

    def of_param(path: tuple, names: LogicalAxes) -> Callable[[tuple[int, ...]], np.ndarray]:
        modules = [entry.key for entry in path]
        first = next((module for module in modules if module in _FIRST_LAYERS), None)
        if names[:1] == ("layers",):

            def stacked(shape: tuple[int, ...]) -> np.ndarray:
                top = num_layers if first else shape[0]
                return (top - np.arange(shape[0])).reshape(-1, *[1] * (len(shape) - 1))

            return stacked
        is_embedding = kind(names) == "table" or any(str(module).startswith("embed") for module in modules)
        return lambda _: np.array(num_layers if first else num_layers + 1 if is_embedding else 0)

    return jax.tree_util.tree_map_with_path(of_param, axes, is_leaf=lambda node: isinstance(node, tuple))


@dataclasses.dataclass(frozen=True)
class LayerRates:
    """Factors of gradients and updates by layer.

    below   from `layers_below_top`
    """

    below: Params
    decay: float
    unfreeze_every: int

    def mask_gradients(self, grads: Params, count: jax.Array) -> Params:
        """The gradients at update `count`, 0 for layers that do not train yet: they have no part in the norm, and their
        moments stay 0."""
        if not self.unfreeze_every:
            return grads
        return self._map(lambda below, grad: jnp.where(self._trains(below, count), grad, 0), grads)

    def scale_updates(self, updates: Params, count: jax.Array) -> Params:
        """The updates times the factor of each layer, 0 for layers that do not train yet."""

        def scale(below: np.ndarray, update: jax.Array) -> jax.Array:
            scaled = update * jnp.asarray(self.decay**below, update.dtype)
            return jnp.where(self._trains(below, count), scaled, 0) if self.unfreeze_every else scaled

        return updates if self.decay == 1 and not self.unfreeze_every else self._map(scale, updates)

    def _trains(self, below: np.ndarray, count: jax.Array) -> jax.Array:
        return count >= below * self.unfreeze_every

    def _map(self, function: Callable, tree: Params) -> dict[str, Any]:
        return jax.tree.map(lambda below, leaf: function(below(leaf.shape), leaf), self.below, tree)
