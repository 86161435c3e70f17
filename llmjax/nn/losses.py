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

    nats      cross-entropy
    z         z-loss times its coefficient: the objective is nats + z
    weight    of the scored tokens
    correct   weight of the tokens whose target has the highest logit (ties count); of classes decided one by one the
              share of the classes that is right. None for numbers
    margin    of preferences, the sum of the differences in reward; else None

    Only nats + z can be differentiated: the gradient of `nats` is that of the sum, and the gradient of `z` is 0.
    """

    nats: jax.Array
    z: jax.Array
    weight: jax.Array
    correct: jax.Array | None
    margin: jax.Array | None = None


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
    return _summed(hidden, unembed, targets, weights, chunk, functools.partial(_token_sums, z_loss=z_loss))


def _summed(hidden, unembed, targets, weights, chunk, score) -> LossSums:
    """Sums of `score`(outputs, targets, weights) -> (LossSums, its gradient by the outputs) over all positions."""
    # This also constrains the gradient. Without it, the partitioner (jax 0.10.2) gave devices the gradient of other
    # devices' rows, for recurrent models on a mesh with three axes.
    hidden = axes.constrain(hidden, "batch", "seq", None)
    rows = axes.spec(("batch", "seq"), weights.shape)
    batch, seq = axes.shard_shape(weights.shape, rows)
    chunk = min(chunk or seq, seq)
    # The head is traced as it runs inside shard_map: at the shape of one device's chunk.
    with axes.manual(axes.sharded_by(rows)):
        example = jax.ShapeDtypeStruct((batch, chunk, hidden.shape[-1]), hidden.dtype)
        head, parameters = jax.closure_convert(unembed, example)
    if axes.device().platform == "cpu":
        head, parameters = _transpose_tables(head, parameters)
    return _differentiable(head, rows, chunk, score, parameters, hidden, targets, weights)


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
def _differentiable(head, rows, chunk, score, parameters, hidden, targets, weights):
    def score_chunk(parameters, h, t, w):
        return score(head(h, *parameters), t, w)[0], None

    return _sum_over_rows(score_chunk, rows, chunk, parameters, (hidden, targets, weights))[0]


def _forward(head, rows, chunk, score, parameters, hidden, targets, weights):
    def score_chunk(parameters, h, t, w):
        logits, transpose = jax.vjp(head, h, *parameters)
        sums, d_logits = score(logits, t, w)
        d_hidden, *d_parameters = transpose(d_logits)
        return (sums, [d.astype(jnp.float32) for d in d_parameters]), d_hidden

    (sums, d_parameters), d_hidden = _sum_over_rows(score_chunk, rows, chunk, parameters, (hidden, targets, weights))
    d_hidden = axes.constrain(d_hidden, "batch", "seq", None)
    # The backward pass needs the types of the parameters, which empty arrays carry.
    return sums, (d_parameters, d_hidden, [jnp.zeros(0, p.dtype) for p in parameters])


def _backward(head, rows, chunk, score, saved, cotangent):
    d_parameters, d_hidden, typed = saved
    scale = lambda d, dtype: (d * cotangent.nats).astype(dtype)
    d_parameters = [scale(d, p.dtype) for d, p in zip(d_parameters, typed, strict=True)]
    return d_parameters, scale(d_hidden, d_hidden.dtype), None, None


_differentiable.defvjp(_forward, _backward)


def _token_sums(logits, targets, weights, *, z_loss: float) -> tuple[LossSums, jax.Array]:
    """(sums, gradient of nats + z by the logits). Targets are compared, not looked up, so that vocab may be sharded."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    exponents = jnp.exp(logits - highest)
    partition = jnp.sum(exponents, axis=-1, keepdims=True)
    log_z = highest + jnp.log(partition)
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1, keepdims=True)
    weights = weights[..., None]
    sums = LossSums(
        nats=jnp.sum(weights * (log_z - target)),
        z=z_loss * jnp.sum(weights * log_z**2),
        weight=jnp.sum(weights),
        correct=jnp.sum(weights * (target >= highest)),
    )
    d_log_z = weights * (1.0 + 2.0 * z_loss * log_z)
    return sums, exponents * (d_log_z / partition) - jnp.where(is_target, weights, 0.0)


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


def _sum_over_rows(score, rows, chunk, parameters, arrays):
    """Apply score(parameters, *chunks) -> (sums, out) to chunks of `arrays` [batch, seq, ...], hidden states first.

    Returns (total sums, outs [batch, seq, ...]). `rows` shards the first two dimensions.
    """
    names = axes.sharded_by(rows)
    if not names:
        return _sum_over_chunks(functools.partial(score, parameters), chunk, arrays)
    # Matrices pass through the type of the hidden states, so that they are gathered in that type.
    gathered = [p.astype(arrays[0].dtype) if p.ndim > 1 else p for p in parameters]

    def of_device(gathered, *arrays):
        full = [g.astype(p.dtype) for g, p in zip(gathered, parameters, strict=True)]
        sums, outs = _sum_over_chunks(functools.partial(score, full), chunk, arrays)
        # Only gradients of parameters have dimensions.
        add = lambda x: _add_gradient(x, names) if x.ndim else jax.lax.psum(x, names)
        return jax.tree.map(add, sums), outs

    return jax.shard_map(
        of_device,
        in_specs=(P(), *(rows for _ in arrays)),
        out_specs=(P(), rows),
        axis_names=set(names),
        check_vma=False,
    )(gathered, *arrays)


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


def _sum_over_chunks(score, chunk, arrays):
    """`_sum_over_rows` of the rows of one device."""
    chunks = tuple(split(x, chunk) for x in arrays)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(score, *(x[0] for x in chunks))[0])

    def body(total, chunk):
        sums, out = score(*chunk)
        return jax.tree.map(jnp.add, total, sums), out

    total, outs = jax.lax.scan(body, zeros, chunks)
    return total, jax.tree.map(lambda x: join(x, arrays[0].shape[1]), outs)


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
