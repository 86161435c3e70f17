"""The optimizer's update with the same bits on any number of devices (parallel.reduction="fixed_tree").

Optimizers that treat each element alone run on one block of the parameters after another, in place: blocks have one
shape on any layout. The others run on the whole weights of one layer after another, which all devices gather and
compute alike. Both are loops that run a number of times that the compiler does not know, so that it compiles them to
the same instructions on any layout. Its algebraic simplifier would still divide in one way or another, so divisions
are hidden from it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core.primitives import div_p, jit_p
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.batch import Params
from llmjax.errors import UserError
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.layerwise import LogicalAxes, kind
from llmjax.parallel import axes
from llmjax.parallel.fixed_tree import FSDP, Shard, gather_shards, hidden_loop, split_at, sum_pairs
from llmjax.parallel.virtual_shards import fsdp_dim, hidden_one, names_of, on_each_device, specs_of
from llmjax.run.state import StateSpec

_ELEMENTWISE = ("adamw", "lion", "sgd", "schedule_free_adamw")  # without moments in fewer bits
# Blocks of a parameter for each virtual shard: one block a device would not do, because the compiler leaves a loop over
# it away.
_BLOCKS = 2


def make_update(optimizer: OptimizerConfig, spec: StateSpec, shards: int) -> Callable:
    """A function (gradients, state, params) -> (params, state, info), as Optimizer.update.

    shards   parallel.virtual_shards
    Raises UserError where a parameter that `fsdp` may shard cannot be cut into blocks.
    """
    count, names = _BLOCKS * shards, names_of(spec.axes)
    dims = [fsdp_dim(axes.spec(of_param)) for of_param in names]
    for of_param, leaf, dim in zip(names, jax.tree.leaves(spec.shapes.params), dims, strict=True):
        if dim is not None and leaf.shape[dim] % count:
            raise UserError(
                f"parallel.virtual_shards={shards}: 'fixed_tree' cuts parameters into {count} blocks along "
                f"{of_param[dim]}, which has {leaf.shape[dim]}; set it to "
                f"{max((leaf.shape[dim] & -leaf.shape[dim]) // _BLOCKS, 1)} or less, a power of two"
            )
    normed = [kind(of_param) != "expert_bias" for of_param in names]
    state_dims = [fsdp_dim(state_spec) for state_spec in specs_of(spec.shardings.opt_state)]
    state_axes = spec.optimizer.state_axes(spec.shapes.params)
    state_names = jax.tree.structure(spec.shapes.opt_state).flatten_up_to(state_axes)
    to_specs = lambda shardings: jax.tree.map(lambda sharding: sharding.spec, shardings)
    param_specs, state_specs = to_specs(spec.shardings.params), to_specs(spec.shardings.opt_state)
    is_elementwise = optimizer.name in _ELEMENTWISE and optimizer.moment_dtype in (None, "float32")

    def of_device(grads: Params, state: Any, params: Params):
        local = count // jax.lax.axis_size(FSDP)
        items = [
            (_to_blocks(leaf, dim, local), dim)
            for leaf, dim, keep in zip(jax.tree.leaves(grads), dims, normed, strict=True)
            if keep
        ]
        norm = _norm([leaf for leaf, _ in items], [dim for _, dim in items])
        update = _hide_divisions(lambda grads, params, state: spec.optimizer.update(grads, state, params, norm))
        trees, one = (grads, params, state), hidden_one(state["count"])
        if is_elementwise:
            return _update_blocks(update, [dims, dims, state_dims], local, one, trees)
        return _update_layers(update, [*dims, *dims, *state_dims], [*names, *names, *state_names], one, trees)

    def update(grads: Params, state: Any, params: Params):
        info = {"learning_rate": P(), "grad_norm": P()}
        run = on_each_device(of_device, (param_specs, state_specs, param_specs), (param_specs, state_specs, info))
        return run(grads, state, params)

    return update


def _hide_divisions(function: Callable) -> Callable:
    """The function of pytrees, with divisions that the compiler leaves as they are, except in its loops and branches.

    XLA turns a / b / c into a / (b * c) and a / b, where b is a scalar, into a * (1 / b). Which of them it does first
    depends on the rest of the program, which is not the same on one device and on several.
    """

    def evaluate(closed: ClosedJaxpr, arguments: list[Any]) -> list[Any]:
        jaxpr = closed.jaxpr
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments], strict=True))
        read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
        for equation in jaxpr.eqns:
            primitive, inputs = equation.primitive, [read(atom) for atom in equation.invars]
            if primitive is jit_p:
                outputs = evaluate(equation.params["jaxpr"], inputs)
            elif primitive is div_p:
                shape = equation.outvars[0].aval.shape
                whole = jax.lax.optimization_barrier([jnp.broadcast_to(x, shape) for x in inputs])
                outputs = [jax.lax.optimization_barrier(jax.lax.div(*whole))]
            else:
                outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
                outputs = outputs if primitive.multiple_results else [outputs]
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def hidden(*trees: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*trees)
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(closed, jax.tree.leaves(trees)))

    return hidden


def _to_blocks(x: jax.Array, dim: int | None, count: int) -> jax.Array:
    """x with its dimension `dim` cut into [count, ...] in front; unchanged for None."""
    return x if dim is None else jnp.moveaxis(x.reshape(*x.shape[:dim], count, -1, *x.shape[dim + 1 :]), dim, 0)


def _from_blocks(x: jax.Array, dim: int | None) -> jax.Array:
    """The inverse of `_to_blocks`."""
    if dim is None:
        return x
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _norm(leaves: list[jax.Array], dims: list[int | None]) -> jax.Array:
    """The norm of a gradient: a sum of squares for each block, or for a leaf that is whole; then in the tree."""
    square = lambda x: jnp.sum(jnp.square(x))
    local = [square(x)[None] if dim is None else jax.lax.map(square, x) for x, dim in zip(leaves, dims, strict=True)]
    gathered = jax.lax.all_gather(jnp.concatenate(local), FSDP)
    parts = zip(split_at(local, gathered), dims, strict=True)
    sums = [sum_pairs(x[0] if dim is None else x.reshape(-1)) for x, dim in parts]
    return jnp.sqrt(sum(sums[1:], sums[0]))


def _update_blocks(update: Callable, cuts: list[list[int | None]], count: int, one: jax.Array, trees: tuple) -> Any:
    """update(grads, params, state) -> (params, state, info), one block after another of all leaves that are cut.

    cuts   for each of `trees`, the dimension of each leaf that is cut; leaves of None are computed from their whole
    one    as in `hidden_loop`
    """
    flat, structures = zip(*(jax.tree.flatten(tree) for tree in trees), strict=True)
    blocks = [[_to_blocks(x, d, count) for x, d in zip(xs, ds, strict=True)] for xs, ds in zip(flat, cuts, strict=True)]
    block = lambda i: [
        [x if d is None else x[i] for x, d in zip(xs, ds, strict=True)] for xs, ds in zip(blocks, cuts, strict=True)
    ]

    def compute(items):
        return update(*(structure.unflatten(leaves) for structure, leaves in zip(structures, items, strict=True)))

    info = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute, block(0))[2])

    def body(i, carry):
        params, state, _ = carry
        new_params, new_state, info = compute(block(i))
        put = lambda old, new, d: new if d is None else old.at[i].set(new)
        params = [put(*item) for item in zip(params, jax.tree.leaves(new_params), cuts[1], strict=True)]
        state = [put(*item) for item in zip(state, jax.tree.leaves(new_state), cuts[2], strict=True)]
        return params, state, info

    params, state, info = hidden_loop(count, one, body, (*blocks[1:], info))
    whole = lambda xs, ds: [_from_blocks(x, d) for x, d in zip(xs, ds, strict=True)]
    return structures[1].unflatten(whole(params, cuts[1])), structures[2].unflatten(whole(state, cuts[2])), info


def _update_layers(
    update: Callable, cuts: list[int | None], names: list[LogicalAxes], one: jax.Array, trees: tuple
) -> Any:
    """As `_update_blocks`, but of the whole weights of one layer after another; what is no layer comes last.

    cuts, names   the dimension that is cut, and the logical axes, of each leaf of all `trees`
    one           as in `hidden_loop`
    """
    leaves, structure = jax.tree.flatten(trees)
    num_params = len(jax.tree.leaves(trees[1]))
    stacks = [leaf.shape[0] if of_leaf[:1] == ("layers",) else 0 for leaf, of_leaf in zip(leaves, names, strict=True)]
    index, size = jax.lax.axis_index(FSDP), jax.lax.axis_size(FSDP)

    def whole_shape(leaf: jax.Array, dim: int | None, stack: int) -> tuple[int, ...]:
        of_dim = lambda d, n: 1 if stack and d == 0 else n * size if d == dim else n
        return tuple(of_dim(d, n) for d, n in enumerate(leaf.shape))

    def own_part(x: jax.Array, like: jax.Array, dim: int | None) -> jax.Array:
        return x if dim is None else jax.lax.dynamic_slice_in_dim(x, index * like.shape[dim], like.shape[dim], dim)

    results: dict[int, jax.Array] = {}
    shapes = [whole_shape(*item) for item in zip(leaves, cuts, stacks, strict=True)]

    def compute(chosen: list[int], whole: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        """(new leaves, info) for the whole leaves that are chosen; the compiler leaves out what the others need."""
        items = [leaf if leaf.ndim == 0 else jnp.zeros(s, leaf.dtype) for leaf, s in zip(leaves, shapes, strict=True)]
        for i, leaf in zip(chosen, whole, strict=True):
            items[i] = leaf
        params, state, info = update(*structure.unflatten(items))
        new = [*items[:num_params], *jax.tree.leaves((params, state))]
        return [new[i] for i in chosen], info

    def update_parts(chosen: list[int], parts: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        """(new parts, info) for the parts of a device."""
        # float32 holds the values of all types of moments, so that one collective gathers all.
        items = zip(chosen, parts, strict=True)
        cut = [x if cuts[i] is None else Shard.of(x.astype(jnp.float32), cuts[i], stacked=False) for i, x in items]
        whole = [x.astype(part.dtype) for x, part in zip(gather_shards(cut), parts, strict=True)]
        # A loop, although it runs once: the compiler fuses nothing with what is before and after it.
        info = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda x: compute(chosen, x)[1], whole)
        )
        new, info = hidden_loop(1, one, lambda _, carry: compute(chosen, carry[0]), (whole, info))
        return [own_part(x, part, cuts[i]) for i, x, part in zip(chosen, new, parts, strict=True)], info

    for stack in sorted(set(stacks) - {0}):
        chosen = [i for i, other in enumerate(stacks) if other == stack]

        def body(layer, stacked, chosen=chosen):
            new, _ = update_parts(chosen, [jax.lax.dynamic_slice_in_dim(x, layer, 1) for x in stacked])
            put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, layer, 0)
            return list(map(put, stacked, new))

        new = hidden_loop(stack, one, body, [leaves[i] for i in chosen])
        results.update(zip(chosen, new, strict=True))
    chosen = [i for i, stack in enumerate(stacks) if not stack]
    new, info = update_parts(chosen, [leaves[i] for i in chosen])
    results.update(zip(chosen, new, strict=True))
    _, params, state = structure.unflatten([results[i] for i in range(len(leaves))])
    return params, state, info
