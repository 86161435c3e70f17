"""The compiled step of a run: what training executes, and what `llmjax plan` compiles without running it."""

from collections.abc import Callable, Mapping
import functools

from flax import nnx
import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.data.config import SEVERAL_TEXTS
from llmjax.errors import UserError
from llmjax.nn import quantized
from llmjax.nn.distillation import make_distillation_loss
from llmjax.nn.pair_losses import choose_loss
from llmjax.parallel import axes, backends, virtual_shards
from llmjax.parallel.backends import CompiledStep, Reduction
from llmjax.parallel.compiler_options import compiler_options
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec, TrainState
from llmjax.train import fixed_tree, fixed_update
from llmjax.train.step import accumulate_gradients, make_loss, train_step


def check_program(config: RunConfig) -> None:
    """Raise UserError where the step of a config cannot be compiled for the mesh of `use_mesh`."""
    backends.check_backend(config.parallel.backend)
    if config.parallel.backend == "pmap" and config.xla.flags:
        raise UserError(f"xla.flags={config.xla.flags}: parallel.backend='pmap' takes no compiler options; use 'jit'")
    for field, size in config.train.batch_sizes.fields:
        backends.check_batch(field, size, config.train.accumulation)
    axes.check_rules()
    backends.check_length("data.seq_len", config.data.seq_len)
    mesh = jax.sharding.get_mesh().shape
    config.model.check(seq_len=config.data.seq_len, tensor=mesh["tensor"])
    config.model.check_mesh(mesh)
    if config.objective.name in SEVERAL_TEXTS and mesh.get("sequence", 1) > 1:
        raise UserError(
            f"mesh.sequence={mesh['sequence']}: objective.name={config.objective.name!r} was not tried with rows that "
            "are cut over devices; set it to 1 and use mesh.fsdp"
        )
    run_config.choose_attention(config)
    quantized.check_installed(config.model.quantization)
    fixed_tree.check(config)


def step_compiler_options(config: RunConfig) -> Mapping[str, str | bool]:
    """Options of XLA's compiler for the train step, on the mesh of `use_mesh`."""
    options = compiler_options(config.xla, jax.sharding.get_mesh())
    return {**virtual_shards.compiler_options(), **options} if config.parallel.reduction == "fixed_tree" else options


def make_program(config: RunConfig, spec: StateSpec, rows: np.ndarray, batch: int) -> CompiledStep:
    """The train step of a config on the mesh of `use_mesh`, compiled when it is first called or lowered.

    rows    this process's rows of a global batch
    batch   the size of the global batch, one of train.batch_sizes
    """
    make_loss_of = functools.partial(
        make_loss,
        spec.graph,
        seed=config.seed,
        chunk=config.train.loss_chunk,
        z_loss=config.train.z_loss,
        class_weights=config.objective.class_weights,
    )
    options = step_compiler_options(config)
    if spec.teacher is not None:
        step = functools.partial(_distill_step, config=config, spec=spec, make_loss_of=make_loss_of)
        return backends.compile_step(step, config.parallel.backend, spec.shardings, rows, batch, options)
    loss = make_loss_of(batch_loss=choose_loss(config.objective))
    if config.parallel.reduction == "fixed_tree":
        shards = config.parallel.virtual_shards
        gradients = virtual_shards.make_gradients(loss, spec.axes, spec.shardings.params, shards)
        update = fixed_update.make_update(config.optimizer, spec, shards)
    else:
        accumulation = config.train.accumulation
        gradients = functools.partial(accumulate_gradients, loss, accumulation=accumulation, trainable=spec.trainable)
        update = spec.update
    step = functools.partial(train_step, gradients=gradients, update=update)
    return backends.compile_step(step, config.parallel.backend, spec.shardings, rows, batch, options)


def _distill_step(
    state: TrainState,
    batch: Batch,
    *,
    reduction: Reduction,
    config: RunConfig,
    spec: StateSpec,
    make_loss_of: Callable[..., Callable],
) -> tuple[TrainState, dict]:
    """`train_step` whose loss reads the teacher of the state."""
    assert spec.teacher is not None
    teacher = nnx.merge(spec.teacher, state.teacher)
    loss = make_loss_of(batch_loss=make_distillation_loss(teacher, config.distill))
    gradients = functools.partial(
        accumulate_gradients, loss, accumulation=config.train.accumulation, trainable=spec.trainable
    )
    return train_step(state, batch, gradients=gradients, update=spec.update, reduction=reduction)
