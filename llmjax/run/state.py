"""The train state: arrays, abstract form, and the sharding of each leaf."""

from collections.abc import Sequence
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from llmjax.batch import Graph, Params
from llmjax.checkpoint.fingerprint import leaf_name
from llmjax.models import registry
from llmjax.models.registry import ModelConfig
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.optimizer import Optimizer, make_optimizer
from llmjax.optim.trainable import choose_trainable, merge, split
from llmjax.parallel import axes

logger = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and writes: arrays, or a tree of the same structure with their shapes or shardings.

    step, skipped   int32 scalars: steps done, and those of them whose update was not finite
    teacher         parameters of a model that a step reads and does not change, which no checkpoint saves; None: there
                    is no such model
    """

    step: Any
    skipped: Any
    params: Params
    opt_state: Any
    teacher: Any = None


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """How a train state is built: the model's graph, the optimizer, and axes, shapes and shardings of the leaves.

    optimizer   of the trained parameters alone
    trainable   for each parameter whether it is trained
    teacher     graph of the model whose parameters are TrainState.teacher, from `teacher.add_teacher`; None: no teacher
    """

    graph: Graph
    optimizer: Optimizer
    trainable: Params
    axes: Params
    shapes: TrainState
    shardings: TrainState
    teacher: Graph | None = None

    def abstract(self) -> TrainState:
        """The state as ShapeDtypeStructs with shardings: what a restore needs."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.shapes,
            self.shardings,
        )

    def init_optimizer(self, params: Params) -> dict[str, Any]:
        """The optimizer's state before the first update."""
        return self.optimizer.init(split(params, self.trainable)[0])

    def update(self, grads: Params, opt_state: dict[str, Any], params: Params) -> tuple[Params, dict, dict]:
        """`Optimizer.update` of the trained parameters, for which `grads` are; the others stay as they are."""
        trained, frozen = split(params, self.trainable)
        trained, opt_state, info = self.optimizer.update(grads, opt_state, trained)
        return merge(trained, frozen), opt_state, info

    def eval_params(self, params: Params, opt_state: dict[str, Any]) -> Params:
        """The parameters to evaluate, sample from and export; `optimizer.eval_params_name` says which they are."""
        trained, frozen = split(params, self.trainable)
        return merge(self.optimizer.eval_params(trained, opt_state), frozen)

    def count_trained(self) -> int:
        """Number of parameters that are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(split(self.shapes.params, self.trainable)[0]))


def make_state_spec(model: ModelConfig, optimizer: OptimizerConfig, *, horizon: int) -> StateSpec:
    """Shapes and shardings of a run's state on the mesh of `use_mesh`. Nothing is allocated.

    horizon   steps over which the schedule of the learning rate runs
    """
    graph, shapes, names = registry.abstract(model)
    trainable, tx = make_trained_optimizer(model, optimizer, shapes, names, horizon=horizon)
    trained = split(shapes, trainable)[0]
    opt_shapes = jax.eval_shape(tx.init, trained)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    replicated = NamedSharding(jax.sharding.get_mesh(), P())
    return StateSpec(
        graph=graph,
        optimizer=tx,
        trainable=trainable,
        axes=names,
        shapes=TrainState(scalar, scalar, shapes, opt_shapes),
        shardings=TrainState(
            replicated,
            replicated,
            axes.shardings(names, shapes),
            axes.shardings(tx.state_axes(trained), opt_shapes),
        ),
    )


def make_trained_optimizer(
    model: ModelConfig, optimizer: OptimizerConfig, shapes: Params, names: Params, *, horizon: int, first: int = 0
) -> tuple[Params, Optimizer]:
    """(for each parameter whether it is trained, the optimizer of those).

    shapes, names    of all parameters of the model: shapes and logical axes
    horizon, first   of the schedule of the learning rate, see `make_schedule`
    Raises UserError as `choose_trainable` does.
    """
    trainable = choose_trainable(optimizer, shapes)
    tx = make_optimizer(
        optimizer,
        horizon=horizon,
        first=first,
        axes=split(names, trainable)[0],
        width=model.width_multiplier,
        num_layers=model.num_layers,
    )
    return trainable, tx


def state_bytes(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of the parameters, and of gradients and optimizer state of the trained ones, over all devices.

    Nothing is allocated.
    """
    _, shapes, names = registry.abstract(model)
    trainable, tx = make_trained_optimizer(model, optimizer, shapes, names, horizon=1_000_000)
    trained = split(shapes, trainable)[0]
    opt_state = jax.eval_shape(tx.init, trained)
    num_bytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return num_bytes(shapes) + num_bytes(trained) + num_bytes(opt_state)


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
        return TrainState(zero, zero, params, spec.init_optimizer(params))

    return jax.jit(create, out_shardings=spec.shardings)()


def add_adapters(spec: StateSpec, model: ModelConfig, base: Params, seed: int) -> Params:
    """The parameters of `model` on the mesh, from those of the model without adapters, which are given up."""
    add = lambda params: registry.add_adapters(model, params, jax.random.key(seed))
    return jax.jit(add, out_shardings=spec.shardings.params, donate_argnums=0)(base)


def abstract_params(model: ModelConfig) -> Params:
    """ShapeDtypeStructs with shardings of the parameters of a model, for a restore."""
    _, shapes, names = registry.abstract(model)
    shape_of = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(shape_of, shapes, axes.shardings(names, shapes))


def merge_adapters(model: ModelConfig, params: Params) -> Params:
    """Parameters of the model without adapters that compute the same; merged weights are float32."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(registry.without_adapters(model)))
    return jax.jit(lambda params: registry.merge_adapters(model, params), out_shardings=shardings)(params)


def draw_parameters(model: ModelConfig, names: Sequence[str], seed: int) -> dict[str, jax.Array]:
    """The values before training, as of `init_state`, of the parameters with these dotted names, on the mesh."""
    if not names:
        return {}

    def draw() -> dict[str, jax.Array]:  # the compiler drops what is not returned
        params = _by_name(registry.init(model, jax.random.key(seed)))
        return {name: params[name] for name in names}

    shardings = _by_name(abstract_params(model))
    return jax.jit(draw, out_shardings={name: shardings[name].sharding for name in names})()


def _by_name(tree: Params) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def take_parameters(saved: Params, model: ModelConfig, seed: int) -> Params:
    """The parameters of `model`: those of `saved` that have their names and shapes, and fresh ones, as of `init_state`,
    in place of the others. Which are fresh and which are not used is logged.

    saved   of another model, such as one with another head, on the mesh
    """
    wanted = abstract_params(model)
    old, shapes = _by_name(saved), _by_name(wanted)
    missing = [key for key, leaf in shapes.items() if key not in old or old[key].shape != leaf.shape]
    if unused := sorted((old.keys() - shapes.keys()) | (set(missing) & old.keys())):
        logger.info("  not used of the checkpoint: %s", ", ".join(unused))
    if missing:
        logger.info("  initialised, as the checkpoint lacks them: %s", ", ".join(missing))
    new = draw_parameters(model, missing, seed)
    leaves = [new.get(key, old.get(key)) for key in shapes]
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


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
                f"{leaf_name(path)} {logical} {leaf.shape}: {size:,} bytes "
                f"stay unsharded over {sorted(by_rules - used)}, which do not divide it"
            )
    return lines


def _mesh_axes(spec: P, mesh: Mesh) -> set[str]:
    """The mesh axes of more than one device that a spec uses."""
    return {name for name in axes.used_axes(spec) if mesh.shape[name] > 1}
