"""The train state: arrays, abstract form, and the sharding of each leaf."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from llmjax.batch import Graph, Params
from llmjax.models import registry
from llmjax.models.registry import ModelConfig
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.optimizer import Optimizer, make_optimizer
from llmjax.parallel import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and writes: arrays, or a tree of the same structure with their shapes or shardings.

    step, skipped   int32 scalars: steps done, and those of them whose update was not finite
    """

    step: Any
    skipped: Any
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """How a train state is built: the model's graph, the optimizer, and axes, shapes and shardings of the leaves."""

    graph: Graph
    optimizer: Optimizer
    axes: Params
    shapes: TrainState
    shardings: TrainState

    def abstract(self) -> TrainState:
        """The state as ShapeDtypeStructs with shardings: what a restore needs."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.shapes,
            self.shardings,
        )


def make_state_spec(model: ModelConfig, optimizer: OptimizerConfig, *, horizon: int) -> StateSpec:
    """Shapes and shardings of a run's state on the mesh of `use_mesh`. Nothing is allocated.

    horizon   train.steps, over which learning rate schedules run
    """
    graph, shapes, names = registry.abstract(model)
    tx = make_optimizer(optimizer, horizon=horizon, axes=names, width=model.width_multiplier)
    opt_shapes = jax.eval_shape(tx.init, shapes)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    replicated = NamedSharding(jax.sharding.get_mesh(), P())
    return StateSpec(
        graph=graph,
        optimizer=tx,
        axes=names,
        shapes=TrainState(scalar, scalar, shapes, opt_shapes),
        shardings=TrainState(
            replicated,
            replicated,
            axes.shardings(names, shapes),
            axes.shardings(tx.state_axes(shapes), opt_shapes),
        ),
    )


def state_bytes(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of the parameters, their gradients and the optimizer's state, over all devices. Nothing is allocated."""
    _, shapes, names = registry.abstract(model)
    opt_state = jax.eval_shape(make_optimizer(optimizer, horizon=1_000_000, axes=names).init, shapes)
    num_bytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return 2 * num_bytes(shapes) + num_bytes(opt_state)


def to_checkpoint(state: TrainState) -> dict:
    """The arrays that a checkpoint saves; its counters are saved as JSON."""
    return {"params": state.params, "opt_state": state.opt_state}


def from_checkpoint(spec: StateSpec, parts: dict, *, step: int, skipped: int) -> TrainState:
    """The state from a checkpoint's arrays and counters."""
    return TrainState(
        step=jax.device_put(jnp.int32(step), spec.shardings.step),
        skipped=jax.device_put(jnp.int32(skipped), spec.shardings.skipped),
        params=parts["params"],
        opt_state=parts["opt_state"],
    )


def init_state(spec: StateSpec, model: ModelConfig, seed: int) -> TrainState:
    """The state before the first step, created on the mesh without a copy on the host."""

    def create() -> TrainState:
        params = registry.init(model, jax.random.key(seed))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, params, spec.optimizer.init(params))

    return jax.jit(create, out_shardings=spec.shardings)()


def unsharded_params(spec: StateSpec) -> list[str]:
    """One line for each parameter whose shape the rules' mesh axes do not divide, with its size in bytes."""
    lines, mesh = [], jax.sharding.get_mesh()
    leaves = jax.tree_util.tree_leaves_with_path(spec.shapes.params)
    names = jax.tree.leaves(spec.axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), logical in zip(leaves, names, strict=True):
        by_rules, used = (_mesh_axes(axes.spec(logical, shape), mesh) for shape in (None, leaf.shape))
        if by_rules - used:
            size = leaf.size * leaf.dtype.itemsize
            lines.append(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} {logical} {leaf.shape}: {size:,} bytes "
                f"stay unsharded over {sorted(by_rules - used)}, which do not divide it"
            )
    return lines


def _mesh_axes(spec: P, mesh: Mesh) -> set[str]:
    """The mesh axes of more than one device that a spec uses."""
    used = {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}
    return {name for name in used if mesh.shape[name] > 1}
