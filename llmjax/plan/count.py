"""The memory of a training step: bytes of the state, and bytes of activations for the backward pass."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from llmjax.batch import Batch, Params
from llmjax.data.batches.packing import Rows
from llmjax.data.batches.rng import CounterRng
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import Bytes
from llmjax.models import registry
from llmjax.models.registry import ModelConfig
from llmjax.nn.pair_losses import choose_loss
from llmjax.nn.stack import REMAT
from llmjax.optim.config import OptimizerConfig
from llmjax.run import config as run_config, state as states
from llmjax.run.config import RunConfig
from llmjax.train.step import make_loss


def state_bytes_per_parameter(model: ModelConfig, optimizer: OptimizerConfig) -> float:
    """Bytes per parameter of the parameter, its gradient and the optimizer's state."""
    return states.state_bytes(model, optimizer) / registry.count_parameters(model)


class ResidualBytes(NamedTuple):
    """Bytes that are kept for the backward pass in the device's memory, and in the host's."""

    device: int
    host: int


def residual_bytes(config: RunConfig) -> dict[str, ResidualBytes]:
    """Bytes that the forward pass of a row keeps for the backward pass, by remat policy; nothing is allocated.

    They are counted in the program that JAX differentiates, before the compiler, which may fuse some away. Temporary
    memory and the parameters are not counted.
    """
    return {name: _count_residual_bytes(config, name) for name in REMAT}


def _count_residual_bytes(config: RunConfig, remat: str) -> ResidualBytes:
    model = dataclasses.replace(config.model, remat=remat)
    graph, shapes, _ = registry.abstract(model)
    loss = make_loss(
        graph,
        seed=0,
        chunk=config.train.loss_chunk,
        z_loss=config.train.z_loss,
        batch_loss=choose_loss(config.objective),
    )

    def forward(params: Params, batch: Batch) -> Any:
        return jax.vjp(lambda params: loss(params, batch)[0], params)

    program = jax.make_jaxpr(forward)(shapes, abstract_batch(config)).jaxpr
    inputs = {id(variable) for variable in program.invars}
    residuals = {id(out): out.aval for out in program.outvars if id(out) not in inputs and hasattr(out, "aval")}
    sizes = {memory: 0 for memory in jax.memory.Space}
    for aval in residuals.values():
        sizes[aval.memory_space] += math.prod(aval.shape) * aval.dtype.itemsize
    return ResidualBytes(device=sizes[jax.memory.Space.Device], host=sizes[jax.memory.Space.Host])


def abstract_batch(config: RunConfig, rows: int = 1) -> Batch:
    """Shapes of a batch of the run's objective: those of a batch that it makes of empty rows."""
    empty = np.zeros((1, config.data.seq_len), np.int32)
    packed = Rows(targets=empty, inputs=empty, segments=empty, positions=empty, scored=empty > 0)
    batch = objective(config).build_batch(packed, np.zeros(1, np.int64), CounterRng(0))
    return jax.tree.map(lambda field: jax.ShapeDtypeStruct((rows, *field.shape[1:]), field.dtype), batch)


def target_len(config: RunConfig) -> int:
    """Positions in a row of targets, which do not depend on the tokenizer."""
    return objective(config).target_len


def objective(config: RunConfig) -> Objective:
    """The run's objective with a tokenizer of bytes, where the shapes of batches matter and not the ids."""
    return run_config.objective(config, Bytes())
