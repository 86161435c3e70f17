"""The compiled step of a run: what training executes, and what `llmjax plan` compiles without running it."""

import functools

import jax
import numpy as np

from llmjax.errors import UserError
from llmjax.optim import schedules
from llmjax.parallel import axes, backends
from llmjax.parallel.backends import CompiledStep
from llmjax.parallel.compiler_options import compiler_options
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec
from llmjax.train.step import make_loss, train_step


def check_program(config: RunConfig) -> None:
    """Raise UserError where the step of a config cannot be compiled for the mesh of `use_mesh`."""
    backends.check_backend(config.parallel.backend)
    if config.parallel.backend == "pmap" and config.xla.flags:
        raise UserError(f"xla.flags={config.xla.flags}: parallel.backend='pmap' takes no compiler options; use 'jit'")
    backends.check_batch("train.global_batch", config.train.global_batch, config.train.accumulation)
    axes.check_rules()
    backends.check_length("data.seq_len", config.data.seq_len)
    mesh = jax.sharding.get_mesh().shape
    config.model.check(seq_len=config.data.seq_len, tensor=mesh["tensor"])
    config.model.check_mesh(mesh)
    run_config.choose_attention(config)
    schedules.make_schedule(config.optimizer, config.train.steps)


def make_program(config: RunConfig, spec: StateSpec, rows: np.ndarray) -> CompiledStep:
    """The train step of a config on the mesh of `use_mesh`, compiled when it is first called or lowered.

    rows  this process's rows of a global batch
    """
    loss = make_loss(spec.graph, seed=config.seed, chunk=config.train.loss_chunk, z_loss=config.train.z_loss)
    step = functools.partial(train_step, loss=loss, optimizer=spec.optimizer, accumulation=config.train.accumulation)
    options = compiler_options(config.xla, jax.sharding.get_mesh())
    return backends.compile_step(
        step, config.parallel.backend, spec.shardings, rows, config.train.global_batch, options
    )
