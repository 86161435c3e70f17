"""Train steps of a tiny model on a mesh, as the training loop compiles them."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
import numpy as np

from llmjax.models.base import BaseModelConfig
from llmjax.nn import losses
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel import axes, backends, hosts
from llmjax.run import state as states
from llmjax.train.step import accumulate_gradients, make_loss, train_step

ROWS = 16  # of a global batch


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )


class Trainer:
    """A compiled train step for `mesh`, and the state that it updates."""

    def __init__(
        self,
        model: BaseModelConfig,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        *,
        backend: str = "jit",
        accumulation: int = 1,
        batch_loss: Callable = losses.batch_loss,
    ):
        self.mesh = mesh
        with axes.use_mesh(mesh):
            spec = states.make_state_spec(model, optimizer, horizon=10)
            rows = hosts.local_rows(backends.batch_sharding(), ROWS)
            loss = make_loss(spec.graph, seed=3, chunk=16, z_loss=1e-3, batch_loss=batch_loss)
            gradients = functools.partial(
                accumulate_gradients, loss, accumulation=accumulation, trainable=spec.trainable
            )
            step = functools.partial(train_step, gradients=gradients, update=spec.update)
            self.compiled = backends.compile_step(step, backend, spec.shardings, rows, ROWS)
            self.state = self.compiled.shard_state(states.init_state(spec, model, seed=0))

    def step(self, batch) -> dict[str, Any]:
        """The metrics of a step on a batch of numpy arrays."""
        with axes.use_mesh(self.mesh):
            self.state, metrics = self.compiled.step(self.state, self.compiled.shard_batch(batch))
        return jax.device_get(metrics)

    def global_state(self) -> states.TrainState:
        """The state as global arrays."""
        return self.compiled.unshard_state(self.state)
