"""The train step: a pure function of (state, batch). Sums and weights first, one division at the end."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Graph, Params
from llmjax.nn import losses
from llmjax.optim import trainable as trainables
from llmjax.parallel import axes
from llmjax.parallel.backends import JIT, Reduction
from llmjax.run.state import TrainState


class Sums(NamedTuple):
    """Sums of a loss over rows, returned with its gradient: see LossSums and Output."""

    loss: losses.LossSums
    aux_loss: Any
    aux_metrics: dict


def make_loss(
    graph: Graph,
    *,
    seed: int,
    chunk: int,
    z_loss: float,
    class_weights: Sequence[float] = (),
    batch_loss: Callable[..., losses.LossSums] = losses.batch_loss,
) -> Callable:
    """A function (params, batch) -> (summed training loss, Sums). Dropout is keyed by seed and sample index.

    chunk          positions of a row whose logits exist at one time
    class_weights  factor of the weight of each target; (): 1
    batch_loss     of the objective, from `pair_losses.choose_loss`, or beside a teacher
    """

    def loss(params: Params, batch: Batch):
        model = nnx.merge(graph, params)
        out = model(batch, jax.random.fold_in(jax.random.key(seed), 1))
        if class_weights:
            factors = jnp.asarray(class_weights, jnp.float32)[batch.targets]
            batch = dataclasses.replace(batch, weights=batch.weights * factors)
        sums = batch_loss(out.hidden, model.unembed, batch, chunk=chunk, z_loss=z_loss)
        return sums.nats + sums.z + out.aux_loss, Sums(sums, out.aux_loss, out.aux_metrics)

    return loss


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    gradients: Callable,
    update: Callable,
    reduction: Reduction = JIT,
) -> tuple[TrainState, dict]:
    """One update.

    gradients  (params, batch) -> (gradients of summed nats, Sums); gradients of the trained parameters alone
    update     (gradients, optimizer state, params) -> (params, optimizer state, info), as StateSpec.update

    Gradients of summed nats are added over microbatches and replicas and divided by the summed weights once, so that
    padding and uneven packing never bias the mean. Where loss or gradient norm is not finite, parameters and optimizer
    state (schedule and EMA counts with it) stay as they were; only the step and `skipped` advance.
    """
    grads, local_sums = gradients(state.params, batch)
    grads, (sums, aux_loss, aux_metrics) = reduction.sum_gradients(grads), reduction.all_sum(local_sums)
    weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    params, opt_state, info = update(grads, state.opt_state, state.params)
    finite = jnp.isfinite(sums.nats + sums.z + aux_loss) & jnp.isfinite(info["grad_norm"])
    new_if_finite = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    skipped = state.skipped + jnp.where(finite, 0, 1)
    metrics = {
        "loss": sums.nats / weight,
        "z_loss": sums.z / weight,
        **({} if sums.correct is None else {"accuracy": sums.correct / weight}),
        **({} if sums.margin is None else {"margin": sums.margin / weight}),
        **({} if sums.kl is None else {"teacher_kl": sums.kl / weight}),
        "num_targets": reduction.all_sum(jnp.sum(batch.weights)),
        "num_tokens": reduction.all_sum(jnp.sum(batch.segments > 0)),
        "grad_norm": info["grad_norm"],
        "learning_rate": info["learning_rate"],
        "skipped_steps": skipped,
        "finite": finite,
        **{name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in aux_metrics.items()},
        "batch_digest": reduction.all_sum(batch_digest(batch, reduction.first_row(batch.inputs.shape[0]))),
    }
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        skipped=skipped,
        params=new_if_finite(params, state.params),
        opt_state=new_if_finite(opt_state, state.opt_state),
    )
    return new_state, metrics


def accumulate_gradients(
    loss: Callable, params: Params, batch: Batch, *, accumulation: int = 1, trainable: Params | None = None
):
    """Gradient sums and loss sums of a batch, over `accumulation` microbatches one after another.

    trainable   for each parameter whether it is trained (None: all are); the others have None in place of a gradient
    """
    trained, frozen = (params, {}) if trainable is None else trainables.split(params, trainable)
    gradient = jax.grad(
        lambda trained, batch: loss(trainables.merge(trained, frozen) if frozen else trained, batch), has_aux=True
    )
    if accumulation == 1:
        return gradient(trained, batch)

    def split(x: jax.Array) -> jax.Array:
        # Microbatch a has rows a, a + accumulation, ...: each device keeps its own rows and nothing is sent.
        x = x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return axes.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, gradient(trained, microbatch)), None

    microbatches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, microbatches)[0]


def batch_digest(batch: Batch, first_row) -> jax.Array:
    """A uint32 hash of every row's index, sample index and tokens. Sums modulo 2^32 have no order: any mesh agrees."""
    row = jnp.arange(batch.inputs.shape[0], dtype=jnp.uint32)[:, None] + jnp.uint32(first_row)
    total = jnp.sum(
        _hash32(_hash32(batch.sample.astype(jnp.uint32)) + row * jnp.uint32(3) + jnp.arange(2, dtype=jnp.uint32))
    )
    fields = [batch.inputs, batch.targets, batch.segments, batch.weights.astype(jnp.int32)]
    if batch.source is not None:
        fields += [batch.source, batch.source_segments]
    if batch.labels is not None:
        fields.append(jax.lax.bitcast_convert_type(batch.labels, jnp.uint32).sum(axis=-1, dtype=jnp.uint32))
    if batch.reference is not None:
        fields.append(jax.lax.bitcast_convert_type(batch.reference, jnp.uint32))
    for field in fields:
        position = row * jnp.uint32(65537) + jnp.arange(field.shape[1], dtype=jnp.uint32)
        total = total * jnp.uint32(31) + jnp.sum(_hash32(_hash32(field.astype(jnp.uint32)) ^ position))
    return total


def _hash32(x: jax.Array) -> jax.Array:
    """A bijection on uint32 with good avalanche (multiply and xor-shift rounds)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
