"""What the tests of every model family share: parameters, compiled programs, and comparisons."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Batch
from llmjax.models import registry
from llmjax.models.base import BaseModelConfig
from llmjax.nn import losses
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.optimizer import make_optimizer
from llmjax.parallel import axes
from tests.batches import progressions
from tests.models.variants import SEQ, VOCAB


@functools.cache
def init_model(config: BaseModelConfig):
    """(graph, parameters), with noise added to every leaf so that no bias is 0 and no scale is 1."""
    params = jax.jit(lambda key: registry.init(config, key))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), leaf.dtype) for leaf in leaves]
    return registry.abstract(config)[0], tree.unflatten(leaves)


@functools.partial(jax.jit, static_argnums=0)
def logits(graph, params, batch, key=None):
    """Logits [batch, seq, padded vocab]; dropout is off without a key."""
    model = nnx.merge(graph, params)
    return model.unembed(model(batch, key).hidden)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(graph, params, batch, key=None):
    """(summed loss with its auxiliary terms, gradients)"""

    def loss(params):
        model = nnx.merge(graph, params)
        output = model(batch, key)
        sums = losses.cross_entropy(output.hidden, model.unembed, batch.targets, batch.weights, chunk=8, z_loss=1e-3)
        return sums.nats + sums.z + output.aux_loss

    return jax.value_and_grad(loss)(params)


def train_on_progressions(model: BaseModelConfig, optimizer: OptimizerConfig, steps: int) -> list[float]:
    """The loss of each step on sequences with a constant difference modulo the vocabulary, which a model learns to
    continue."""
    graph, params = init_model(model)
    rule = make_optimizer(optimizer, horizon=steps, axes=registry.abstract(model)[2])

    @jax.jit
    def value_and_grads(params, batch):
        def loss(params):
            model = nnx.merge(graph, params)
            hidden = model(batch).hidden
            sums = losses.cross_entropy(hidden, model.unembed, batch.targets, batch.weights, chunk=SEQ, z_loss=0.0)
            return sums.nats / jnp.sum(batch.weights)

        return jax.value_and_grad(loss)(params)

    found, state, update = [], rule.init(params), jax.jit(rule.update)
    for step in range(steps):
        value, grads = value_and_grads(params, progressions(step, 8, SEQ, VOCAB))
        params, state, _ = update(grads, state, params)
        found.append(float(value))
    return found


def assert_close(actual, expected, rtol: float) -> None:
    """Every leaf within `rtol` of its largest value, or of 1: some gradients are 0 but for rounding."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max()))


def replace_tokens(batch: Batch, where: np.ndarray, vocab: int, source_where: np.ndarray | None = None) -> Batch:
    """The batch with other inputs and targets at `where`, and other source tokens at `source_where`."""
    replace = lambda tokens, where: np.where(where, (tokens + 7) % vocab, tokens).astype(np.int32)
    changes = {name: replace(getattr(batch, name), where) for name in ("inputs", "targets")}
    if source_where is not None:
        changes["source"] = replace(batch.source, source_where)
    return dataclasses.replace(batch, **changes)


def document_alone(batch: Batch, number: int) -> Batch:
    """A row [1, seq] of document `number` of a one-row batch: moved to the front, everything else padding."""

    def front(x: np.ndarray, segments: np.ndarray) -> np.ndarray:
        tokens = x[:, segments[0] == number]
        return np.pad(tokens, [(0, 0), (0, x.shape[1] - tokens.shape[1])])

    changes = {}
    for name, x in vars(batch).items():
        if isinstance(x, np.ndarray) and name != "sample":
            changes[name] = front(x, batch.source_segments if name.startswith("source") else batch.segments)
    return dataclasses.replace(batch, **changes)


def sharded_loss_and_grads(config: BaseModelConfig, params, batch: Batch, shape: tuple[int, int, int]):
    """`loss_and_grads` on a mesh of (data, fsdp, tensor) devices, by the default rules of logical axes."""
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    graph, _, names = registry.abstract(config)
    with axes.use_mesh(mesh):
        shardings = axes.shardings(names, params)
        rows = jax.NamedSharding(mesh, axes.spec(("batch",), mesh=mesh))
        return loss_and_grads(graph, jax.device_put(params, shardings), jax.device_put(batch, rows))
