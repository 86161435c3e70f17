"""Losses as sums: token cross-entropy in chunks of the sequence, so that [batch, seq, vocab] logits never exist, and
the losses of labels."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.batch import Batch
from llmjax.parallel import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over scored tokens, float32 scalars; divide them once, after all shards and microbatches are added.

    nats      cross-entropy, or another loss of the objective
    z         z-loss times its coefficient: the objective is nats + z
    weight    of the scored tokens
    correct   weight of the tokens whose target has the highest logit (ties count); of classes decided one by one the
              share of the classes that is right. None for numbers
    margin    of preferences, the sum of the differences in reward; else None
    kl        of distillation, the sum of the divergences from the teacher's predictions; else None

    Only nats + z can be differentiated: the gradient of `nats` is that of the sum, and the gradient of `z` is 0.
    """

    nats: jax.Array
    z: jax.Array
    weight: jax.Array
    correct: jax.Array | None
    margin: jax.Array | None = None
    kl: jax.Array | None = None


def batch_loss(
    hidden: jax.Array, unembed: Callable[[jax.Array], jax.Array], batch: Batch, *, chunk: int, z_loss: float
) -> LossSums:
    """The loss of a batch: cross-entropy of its targets, or the loss of its labels; arguments as of `cross_entropy`.

    Of labels it is the mean over the outputs of binary cross-entropy (batch.multi_label), or of the squared error.
    """
    if batch.labels is None:
        return cross_entropy(hidden, unembed, batch.targets, batch.weights, chunk=chunk, z_loss=z_loss)
    score = _binary_sums if batch.multi_label else _squared_sums
    return _summed(hidden, unembed, batch.labels, batch.weights, chunk, score)


def cross_entropy(
    hidden: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    z_loss: float,
) -> LossSums:
    """Weighted cross-entropy of hidden states [batch, seq, embed] against targets [batch, seq], summed.

    `unembed` returns float32 logits [..., vocab] for `chunk` positions at a time (0: all at once). Under
    differentiation, each chunk's gradient is computed together with its logits, so logits are neither stored nor
    computed twice. `z_loss` times the squared log partition function keeps logits near 0 (PaLM, arXiv 2204.02311).

    Where the mesh shards the rows, each device loops over the chunks of its own rows. What `unembed` reads is gathered
    once before this loop, matrices in the type of `hidden`, to which `unembed` must cast them. Their gradients are
    summed in float32 on each device, and over the devices once, after the loop, in `axes.gradient_dtype`, by default in
    float32.
    """
    return _summed(hidden, unembed, targets, weights, chunk, functools.partial(token_sums, z_loss=z_loss))


def _summed(hidden, unembed, targets, weights, chunk, score) -> LossSums:
    """Sums of `score`(outputs, targets, weights) -> (LossSums, its gradient by the outputs) over all positions."""
    hidden, rows, chunk = _constrain(hidden, weights, chunk)
    head, parameters = _convert_head(unembed, hidden, rows, chunk)
    score_outputs = lambda outputs, teacher, targets, weights: score(outputs, targets, weights)
    return _differentiable(head, rows, chunk, score_outputs, parameters, hidden, (), targets, weights)


def sum_beside_teacher(hidden, unembed, teacher_hidden, teacher_unembed, targets, weights, chunk, score) -> LossSums:
    """Sums of `score`(outputs, teacher's outputs, targets, weights) -> (LossSums, its gradient by `outputs`).

    The outputs of both models exist for `chunk` positions at a time, and the teacher gets no gradient. Arguments as of
    `cross_entropy`.
    """
    hidden, rows, size = _constrain(hidden, weights, chunk)
    teacher_hidden, _, _ = _constrain(jax.lax.stop_gradient(teacher_hidden), weights, chunk)
    head, parameters = _convert_head(unembed, hidden, rows, size)
    teacher_head, frozen = _convert_head(teacher_unembed, teacher_hidden, rows, size)

    def score_outputs(outputs, teacher, targets, weights):
        ((frozen, teacher_hidden),) = teacher
        return score(outputs, teacher_head(teacher_hidden, *frozen), targets, weights)

    teacher = ((frozen, teacher_hidden),)
    return _differentiable(head, rows, size, score_outputs, parameters, hidden, teacher, targets, weights)


def _constrain(hidden, weights, chunk) -> tuple[jax.Array, P, int]:
    """(hidden states on the mesh, the spec of their rows, positions in a chunk of a device)."""
    # This also constrains the gradient. Without it, the partitioner (jax 0.10.2) gave devices the gradient of other
    # devices' rows, for recurrent models on a mesh with three axes.
    hidden = axes.constrain(hidden, "batch", "seq", None)
    rows = axes.spec(("batch", "seq"), weights.shape)
    seq = axes.shard_shape(weights.shape, rows)[1]
    return hidden, rows, min(chunk or seq, seq)


def _convert_head(unembed, hidden, rows, chunk):
    """(function of hidden states and parameters, parameters that `unembed` reads)."""
    batch = axes.shard_shape(hidden.shape[:2], rows)[0]
    # The head is traced as it runs inside shard_map: at the shape of one device's chunk.
    with axes.manual(axes.sharded_by(rows)):
        example = jax.ShapeDtypeStruct((batch, chunk, hidden.shape[-1]), hidden.dtype)
        head, parameters = jax.closure_convert(unembed, example)
    if axes.device().platform == "cpu":
        head, parameters = _transpose_tables(head, parameters)
    return head, parameters


def _transpose_tables(head, parameters):
    """(head, parameters), with matrices that have more rows than columns passed transposed.

    These are embedding tables [vocab, embed], which a tied head reads transposed. A loop over chunks that reads the
    table itself also adds its gradient as [vocab, embed]. XLA:CPU (jax 0.10.2) has no fast product of that form: the
    head's time there is a tenth longer. On TPU the transposed table would be a copy in HBM.
    """
    tall = [p.ndim == 2 and p.shape[0] > p.shape[1] for p in parameters]
    transpose = lambda matrices: [m.T if t else m for m, t in zip(matrices, tall, strict=True)]
    return lambda hidden, *matrices: head(hidden, *transpose(matrices)), transpose(parameters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _differentiable(head, rows, chunk, score, parameters, hidden, teacher, targets, weights):
    """Sums of score(outputs, teacher, targets, weights); `teacher` is (), or ((parameters, hidden states),)."""

    def score_chunk(model, teacher, targets, weights):
        parameters, hidden = model
        return score(head(hidden, *parameters), teacher, targets, weights)[0], None

    return _sum_over_rows(score_chunk, rows, chunk, ((parameters, hidden), *teacher), targets, weights)[0]


def _forward(head, rows, chunk, score, parameters, hidden, teacher, targets, weights):
    def score_chunk(model, teacher, targets, weights):
        parameters, hidden = model
        logits, transpose = jax.vjp(head, hidden, *parameters)
        sums, d_logits = score(logits, teacher, targets, weights)
        d_hidden, *d_parameters = transpose(d_logits)
        return (sums, [d.astype(jnp.float32) for d in d_parameters]), d_hidden

    models = ((parameters, hidden), *teacher)
    (sums, d_parameters), d_hidden = _sum_over_rows(score_chunk, rows, chunk, models, targets, weights)
    d_hidden = axes.constrain(d_hidden, "batch", "seq", None)
    # The backward pass needs the types of the parameters, which empty arrays carry.
    return sums, (d_parameters, d_hidden, [jnp.zeros(0, p.dtype) for p in parameters])


def _backward(head, rows, chunk, score, saved, cotangent):
    d_parameters, d_hidden, typed = saved
    scale = lambda d, dtype: (d * cotangent.nats).astype(dtype)
    d_parameters = [scale(d, p.dtype) for d, p in zip(d_parameters, typed, strict=True)]
    return d_parameters, scale(d_hidden, d_hidden.dtype), None, None, None


_differentiable.defvjp(_forward, _backward)


def token_sums(logits, targets, weights, *, z_loss: float, share: float = 1.0) -> tuple[LossSums, jax.Array]:
    """(sums, gradient of nats + z by the logits); nats are `share` times the cross-entropy.

    Targets are compared, not looked up, so that vocab may be sharded.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    exponents = jnp.exp(logits - highest)
    partition = jnp.sum(exponents, axis=-1, keepdims=True)
    log_z = highest + jnp.log(partition)
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1, keepdims=True)
    weights = weights[..., None]
    sums = LossSums(
        nats=share * jnp.sum(weights * (log_z - target)),
        z=z_loss * jnp.sum(weights * log_z**2),
        weight=jnp.sum(weights),
        correct=jnp.sum(weights * (target >= highest)),
    )
    d_log_z = weights * (share + 2.0 * z_loss * log_z)
    return sums, exponents * (d_log_z / partition) - jnp.where(is_target, share * weights, 0.0)


def _binary_sums(logits, labels, weights) -> tuple[LossSums, jax.Array]:
    """(sums, gradient by the logits) of binary cross-entropy, whose mean is over the classes [..., classes]."""
    share = weights[..., None] / logits.shape[-1]
    sums = LossSums(
        nats=jnp.sum(share * (jax.nn.softplus(logits) - labels * logits)),
        z=jnp.zeros((), jnp.float32),
        weight=jnp.sum(weights),
        correct=jnp.sum(share * ((logits > 0) == (labels > 0))),
    )
    return sums, share * (jax.nn.sigmoid(logits) - labels)


def _squared_sums(outputs, labels, weights) -> tuple[LossSums, jax.Array]:
    """(sums, gradient by the outputs) of the squared error, whose mean is over the numbers [..., outputs]."""
    share, error = weights[..., None] / outputs.shape[-1], outputs - labels
    zero = jnp.zeros((), jnp.float32)
    return LossSums(nats=jnp.sum(share * error**2), z=zero, weight=jnp.sum(weights), correct=None), 2 * share * error


def _sum_over_rows(score, rows, chunk, models, targets, weights):
    """Apply score(model, teacher, targets, weights) -> (sums, out) to chunks of the positions.

    models   (parameters, hidden states [batch, seq, embed]) of the model, and of the teacher if there is one; of a
             chunk, `score` takes that of the model, and a tuple of the rest
    Returns (total sums, outs [batch, seq, ...]). `rows` shards the first two dimensions.
    """
    names = axes.sharded_by(rows)
    parameters, hidden = ([model[i] for model in models] for i in range(2))
    if not names:
        return _sum_over_chunks(score, chunk, parameters, hidden, targets, weights)
    # Matrices pass through the type of the hidden states, so that they are gathered in that type.
    gathered = [
        [p.astype(h.dtype) if p.ndim > 1 else p for p in of_model]
        for of_model, h in zip(parameters, hidden, strict=True)
    ]

    def of_device(gathered, hidden, targets, weights):
        full = jax.tree.map(lambda g, p: g.astype(p.dtype), gathered, parameters)
        sums, outs = _sum_over_chunks(score, chunk, full, hidden, targets, weights)
        # Only gradients of parameters have dimensions.
        add = lambda x: _add_gradient(x, names) if x.ndim else jax.lax.psum(x, names)
        return jax.tree.map(add, sums), outs

    return jax.shard_map(
        of_device,
        in_specs=(P(), rows, rows, rows),
        out_specs=(P(), rows),
        axis_names=set(names),
        check_vma=False,
    )(gathered, hidden, targets, weights)


def _add_gradient(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The sum of float32 `x` over the devices along `names`, added in `axes.gradient_dtype`."""
    rounded = x.astype(axes.gradient_dtype(x.dtype))
    in_float32 = lambda x: jax.lax.psum(x.astype(jnp.float32), names)
    if rounded.dtype == jnp.float32:
        return in_float32(rounded)
    # The CPU compiler (jax 0.10.2) aborts on a sum in bfloat16 here; elsewhere it adds in float32 and rounds as well.
    return jax.lax.platform_dependent(
        rounded, cpu=in_float32, default=lambda x: jax.lax.psum(x, names).astype(jnp.float32)
    )


def _sum_over_chunks(score, chunk, parameters, hidden, targets, weights):
    """`_sum_over_rows` of the rows of one device; `parameters` and `hidden` are lists over the models."""

    def score_chunk(hidden, targets, weights):
        model, *teacher = zip(parameters, hidden, strict=True)
        return score(model, tuple(teacher), targets, weights)

    chunks = jax.tree.map(lambda x: split(x, chunk), (hidden, targets, weights))
    first = jax.tree.map(lambda x: x[0], chunks)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(score_chunk, *first)[0])

    def body(total, chunk):
        sums, out = score_chunk(*chunk)
        return jax.tree.map(jnp.add, total, sums), out

    total, outs = jax.lax.scan(body, zeros, chunks)
    return total, jax.tree.map(lambda x: join(x, weights.shape[1]), outs)


def split(x: jax.Array, chunk: int) -> jax.Array:
    """[batch, seq, ...] -> [chunks, batch, chunk, ...]; the last chunk is padded with zeros, which have weight 0."""
    batch, seq, *rest = x.shape
    if padding := -seq % chunk:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(batch, -1, chunk, *rest), 1, 0)


def join(x: jax.Array, seq: int) -> jax.Array:
    """[chunks, batch, chunk, ...] -> [batch, seq, ...]: the inverse of `split`."""
    chunks, batch, chunk, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk, *rest)[:, :seq]
