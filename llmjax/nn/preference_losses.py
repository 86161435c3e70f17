"""Losses of preferences: direct preference optimization, and the Bradley-Terry loss of reward models."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.batch import Batch
from llmjax.nn.losses import LossSums, join, split
from llmjax.parallel import axes


def answer_log_likelihoods(
    hidden: jax.Array, unembed: Callable[[jax.Array], jax.Array], batch: Batch, *, chunk: int
) -> jax.Array:
    """Summed log-likelihoods of the scored targets of each segment: float32 [batch, batch.num_texts].

    hidden   [batch, seq, embed]
    unembed  returns float32 logits [..., vocab], for `chunk` positions at a time; they are computed again for gradients
    """
    hidden = axes.constrain(hidden, "batch", "seq", None)

    @jax.checkpoint
    def score(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logits = unembed(hidden)
        # Targets are compared, not looked up, so that vocab may be sharded.
        is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    size = min(chunk, hidden.shape[1])
    chunks = jax.lax.map(lambda part: score(*part), (split(hidden, size), split(batch.targets, size)))
    scores = join(chunks, hidden.shape[1]) * batch.weights
    return jnp.stack([jnp.sum(scores * (batch.segments == n + 1), axis=1) for n in range(batch.num_texts)], axis=1)


def dpo_loss(log_likelihoods: jax.Array, reference: jax.Array, is_record: jax.Array, *, beta: float) -> LossSums:
    """Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290).

    log_likelihoods, reference  float32 [batch, 2], of the chosen and of the rejected answer
    is_record                   bool [batch], False for padding
    The margin of a record is beta times how much more likely than under the reference the model has made the chosen
    answer, less the same of the rejected one. The loss is -log sigmoid of the margin.
    """
    reward = beta * (log_likelihoods - reference)
    return preference_loss(reward[:, 0] - reward[:, 1], is_record)


def preference_loss(margin: jax.Array, is_record: jax.Array) -> LossSums:
    """-log sigmoid of the margin of each record [batch] (Bradley and Terry, 1952); a record is correct above 0."""
    sum_records = lambda values: jnp.sum(jnp.where(is_record, values, 0.0))
    return LossSums(
        nats=sum_records(jax.nn.softplus(-margin)),
        z=jnp.zeros((), jnp.float32),
        weight=jnp.sum(is_record.astype(jnp.float32)),
        correct=sum_records((margin > 0).astype(jnp.float32)),
        margin=sum_records(margin),
    )
