"""Classify parameters by their logical axes, and apply a transformation to each layer of a stack separately.

Layers are stacked along a leading "layers" axis, experts and the blocks of a block-diagonal matrix along the axis after
it, and heads have an axis, so the number of dimensions does not tell matrices from vectors: ("layers", "embed") is a
norm scale, ("heads", "head_dim") a bias, ("embed", "heads", "head_dim") a matrix.
"""

from collections.abc import Callable
import math

import jax
import optax

from llmjax.batch import Params

LogicalAxes = tuple[str | None, ...]
Dims = tuple[int, ...]


def stack_depth(axes: LogicalAxes) -> int:
    """Number of leading dimensions that stack separate parameters: layers, and experts or diagonal blocks."""
    depth = int(axes[:1] == ("layers",))
    return depth + (axes[depth : depth + 1] in (("experts",), ("blocks",)) and len(axes) > depth + 1)


def matrix_dims(axes: LogicalAxes) -> tuple[Dims, Dims] | None:
    """(input dims, output dims) of the weight of one layer or expert; None for a vector.

    "head_dim" belongs to the heads before it. With more than two groups of dims, the last group is the output if it is
    "embed"; otherwise the first group is the input.
    """
    groups: list[Dims] = []
    for dim in range(stack_depth(axes), len(axes)):
        if axes[dim] == "head_dim" and groups:
            groups[-1] += (dim,)
        else:
            groups.append((dim,))
    if len(groups) < 2:
        return None
    split = len(groups) - 1 if axes[-1] == "embed" else 1
    return sum(groups[:split], ()), sum(groups[split:], ())


def kind(axes: LogicalAxes) -> str:
    """ "vector" (norm scales, biases), "table" (rows looked up: embedding, learned positions), "head", "matrix", or
    "expert_bias": a router's expert bias, of the axes ("experts",), whose gradient is the load above the mean."""
    if axes[-1:] == ("experts",):
        return "expert_bias"
    dims = matrix_dims(axes)
    if dims is None:
        return "vector"
    if axes[dims[0][0]] in ("vocab", "entries", None):
        return "table"
    return "head" if "vocab" in axes or "outputs" in axes else "matrix"


def matrix_view(shape: tuple[int, ...], axes: LogicalAxes) -> tuple[tuple[int, ...], LogicalAxes]:
    """(shape, axes) of the parameter as [layers, experts,] input, output; a vector as [layers, experts,] size.

    A merged dimension has the name of its first axis, which is the one that shards it.
    """
    stack = stack_depth(axes)
    groups = matrix_dims(axes) or (tuple(range(stack, len(shape))),)
    sizes = tuple(math.prod(shape[d] for d in group) for group in groups)
    names = tuple(axes[group[0]] if group else None for group in groups)
    return shape[:stack] + sizes, axes[:stack] + names


def per_layer(inner: optax.GradientTransformation, axes: Params) -> optax.GradientTransformation:
    """Apply `inner` to the matrix view of every parameter, and separately to each layer and expert of a stacked one.

    The state is a tree like `axes` with a state of `inner` at each leaf; layers and experts are its leading dimensions.
    """

    def view(leaf: jax.Array, names: LogicalAxes) -> jax.Array:
        return leaf.reshape(matrix_view(leaf.shape, names)[0])

    def over_layers(function: Callable, names: LogicalAxes) -> Callable:
        for _ in range(stack_depth(names)):
            function = jax.vmap(function)
        return function

    def init(params):
        return jax.tree.map(lambda p, names: over_layers(inner.init, names)(view(p, names)), params, axes)

    def update(updates, state, params=None):
        def one(grad, leaf_state, param, names):
            new, leaf_state = over_layers(inner.update, names)(view(grad, names), leaf_state, view(param, names))
            return new.reshape(grad.shape), leaf_state

        leaves, structure = jax.tree.flatten(updates)
        others = (structure.flatten_up_to(tree) for tree in (state, params, axes))
        new_updates, states = zip(*map(one, leaves, *others), strict=True)
        return structure.unflatten(new_updates), structure.unflatten(states)

    return optax.GradientTransformation(init, update)
