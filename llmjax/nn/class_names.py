"""Classification as text to text: a decoder scores the name of every class (T5, arXiv 1910.10683)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.batch import Batch


def score_names(model: Any, batch: Batch, names: jax.Array) -> jax.Array:
    """Log-likelihoods of all names for each document: float32 [batch, documents, classes].

    batch   from `labelled.build_named_batch`: each document has `width` targets, one document after the other. Which
            class its targets name has no effect
    names   int32 [classes, width], the ids of each name with EOS at its end, padded with -1

    The encoder reads each document once.
    """
    width = names.shape[1]
    targets = names[:, batch.positions]
    inputs = jnp.where(batch.positions == 0, batch.inputs, names[:, batch.positions - 1])
    read = lambda inputs: model(dataclasses.replace(batch, inputs=jnp.maximum(inputs, 0))).hidden
    hidden = jax.vmap(read)(inputs)

    def score_targets(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = item
        log_likelihoods = jax.nn.log_softmax(model.unembed(hidden))
        at = jnp.maximum(targets, 0)[..., None]
        return jnp.where(targets >= 0, jnp.take_along_axis(log_likelihoods, at, axis=-1)[..., 0], 0.0)

    # One class at a time, as logits [classes, batch, seq, vocab] may not fit in memory.
    by_target = jax.lax.map(score_targets, (hidden, targets))
    return jnp.moveaxis(_by_document(by_target, width).sum(axis=-1), 0, -1)


def make_class_batch(batch: Batch, names: jax.Array) -> Batch:
    """The batch with one target for each document: targets int32 [batch, documents], the number of the class whose name
    its targets are; weights float32 [batch, documents], 0 where there is no document."""
    width = names.shape[1]
    written = _by_document(jnp.where(batch.weights > 0, batch.targets, -1), width)
    is_class = jnp.all(written[:, :, None] == names, axis=-1)
    has_document = _by_document(batch.segments, width)[..., 0] > 0
    targets = jnp.argmax(is_class, axis=-1).astype(jnp.int32)
    return dataclasses.replace(batch, targets=targets, weights=has_document.astype(jnp.float32))


def _by_document(values: jax.Array, width: int) -> jax.Array:
    """[..., seq] -> [..., documents, width]; positions at the end where no document fits are left out."""
    documents = values.shape[-1] // width
    return values[..., : documents * width].reshape(*values.shape[:-1], documents, width)
