"""Losses of records of several texts, from the hidden states of all their texts."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from llmjax.batch import Batch
from llmjax.data.config import ObjectiveConfig
from llmjax.nn.losses import LossSums, batch_loss
from llmjax.nn.pooling import pool
from llmjax.nn.preference_losses import answer_log_likelihoods, dpo_loss, preference_loss
from llmjax.parallel import axes

BETA = 0.1
TEMPERATURE = 0.05  # as in SimCSE (Gao et al., 2021, arXiv 2104.08821)


def choose_loss(objective: ObjectiveConfig) -> Callable[..., LossSums]:
    """The loss of an objective's batches, with the signature of `losses.batch_loss`."""
    if objective.name == "contrastive":
        temperature = TEMPERATURE if objective.temperature is None else objective.temperature
        return functools.partial(_contrastive_batch_loss, pooling=objective.pooling or "mean", temperature=temperature)
    if objective.name == "similarity":
        return functools.partial(_similarity_batch_loss, pooling=objective.pooling or "mean")
    if objective.name == "dpo":
        return functools.partial(_dpo_batch_loss, beta=BETA if objective.beta is None else objective.beta)
    if objective.name == "reward":
        return _reward_batch_loss
    return batch_loss


def find_records(batch: Batch) -> jax.Array:
    """bool [batch]: which rows are records; the others are padding of the batch."""
    return jnp.any(batch.weights > 0, axis=1)


def _contrastive_batch_loss(hidden, unembed, batch, *, chunk, z_loss, pooling, temperature) -> LossSums:
    """`contrastive_loss` of a batch; it has no logits of tokens, for which the other arguments are."""
    vectors = embed_texts(hidden, batch, pooling)
    return contrastive_loss(vectors, find_records(batch), temperature=temperature)


def _similarity_batch_loss(hidden, unembed, batch, *, chunk, z_loss, pooling) -> LossSums:
    """`similarity_loss` of a batch."""
    cosines = text_cosines(hidden, batch, pooling)
    return similarity_loss(cosines, batch.labels[:, 0, 0], find_records(batch))


def text_cosines(hidden: jax.Array, batch: Batch, pooling: str) -> jax.Array:
    """hidden [batch, seq, embed] -> float32 [batch]: the cosine of the vectors of the two texts of each record."""
    vectors = embed_texts(hidden, batch, pooling)
    return jnp.sum(vectors[:, 0] * vectors[:, 1], axis=-1)


def similarity_loss(cosines: jax.Array, scores: jax.Array, is_record: jax.Array) -> LossSums:
    """The squared error of cosines [batch] against scores [batch], as of Sentence-BERT (Reimers and Gurevych, 2019,
    arXiv 1908.10084)."""
    zero = jnp.zeros((), jnp.float32)
    nats = jnp.sum(jnp.where(is_record, (cosines - scores) ** 2, 0.0))
    return LossSums(nats=nats, z=zero, weight=jnp.sum(is_record.astype(jnp.float32)), correct=None)


def _dpo_batch_loss(hidden, unembed, batch, *, chunk, z_loss, beta) -> LossSums:
    """`dpo_loss` of a batch."""
    log_likelihoods = answer_log_likelihoods(hidden, unembed, batch, chunk=chunk)
    return dpo_loss(log_likelihoods, batch.reference, find_records(batch), beta=beta)


def _reward_batch_loss(hidden, unembed, batch, *, chunk, z_loss) -> LossSums:
    """`preference_loss` of the rewards of a batch's answers, which the head gives at their last tokens."""
    ends = [pool(hidden, batch.segments == number + 1, "last") for number in range(batch.num_texts)]
    rewards = unembed(jnp.stack(ends, axis=1).astype(hidden.dtype))[..., 0]
    return preference_loss(rewards[:, 0] - rewards[:, 1], find_records(batch))


def embed_texts(hidden: jax.Array, batch: Batch, pooling: str) -> jax.Array:
    """hidden [batch, seq, embed] -> float32 [batch, batch.num_texts, embed]: the vector of each text, of length 1."""
    hidden = axes.constrain(hidden, "batch", "seq", None)  # and so is the gradient, as in losses._summed
    texts = [pool(hidden, batch.segments == number + 1, pooling) for number in range(batch.num_texts)]
    vectors = jnp.stack(texts, axis=1)
    # An empty text has the vector 0, where the norm has no gradient.
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def contrastive_loss(vectors: jax.Array, is_record: jax.Array, *, temperature: float) -> LossSums:
    """Cross-entropy of each first text's second one against all texts of the batch that are not first ones.

    vectors    float32 [batch, texts, embed] of length 1; texts are first, second, and optionally a hard negative
    is_record  bool [batch], False for padding
    The logits are cosines over the temperature. InfoNCE (van den Oord et al., 2018, arXiv 1807.03748) with the other
    records of the batch as negatives (Henderson et al., 2017, arXiv 1705.00652). Under jit the batch is the global
    one: each device compares its own rows with the texts of all devices.
    """
    batch, texts, embed = vectors.shape
    first = axes.constrain(vectors[:, 0], "batch", None)
    # Candidate j of row i is the second text of record j for j < batch, then come the negatives.
    candidates = jnp.swapaxes(vectors[:, 1:], 0, 1).reshape((texts - 1) * batch, embed)
    candidates = axes.constrain(candidates, None, None)
    logits = jnp.matmul(first, candidates.T, precision=jax.lax.Precision.HIGHEST) / temperature
    # Finite, so that the gradient of a batch of padding is 0 and not NaN.
    logits = jnp.where(jnp.tile(is_record, texts - 1), axes.constrain(logits, "batch", None), -1e30)
    is_own = jnp.arange(batch)[:, None] == jnp.arange(logits.shape[1])
    own = jnp.sum(jnp.where(is_own, logits, 0.0), axis=1)
    log_z, highest = jax.nn.logsumexp(logits, axis=1), jnp.max(logits, axis=1)
    return LossSums(
        nats=jnp.sum(jnp.where(is_record, log_z - own, 0.0)),
        z=jnp.zeros((), jnp.float32),
        weight=jnp.sum(is_record.astype(jnp.float32)),
        correct=jnp.sum((is_record & (own >= highest)).astype(jnp.float32)),
    )
