"""Embedding tables, and the head that maps hidden states to logits."""

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.nn import weights
from llmjax.nn.linear import project
from llmjax.parallel.axes import constrain

# Logit of a padding id and score of a masked key: its exp() is 0, and unlike -inf it gives no NaN in a difference.
MASKED = -1e30


class Embedding(nnx.Module):
    """A table of vectors that are looked up: token embeddings, learned positions.

    entries   logical axis of the rows
    """

    def __init__(self, key: jax.Array, num_entries: int, embed: int, *, entries: str, dtype: str, std: float = 0.02):
        self.table = weights.normal(key, {entries: num_entries, "embed": embed}, std=std, dtype=dtype)
        self.entries = entries

    def __call__(self, tokens: jax.Array, dtype: str) -> jax.Array:
        """tokens [batch, seq] -> [batch, seq, embed], in the compute type `dtype`."""
        # fsdp shards both the batch and the table's embed. Gather embed before the lookup; otherwise the partitioner
        # replicates the batch.
        table = constrain(self.table[...].astype(dtype), self.entries, None)
        return constrain(jnp.take(table, tokens, axis=0, mode="clip"), "batch", "seq", None)


def logits(
    hidden: jax.Array, table: jax.Array, *, vocab_size: int, scale: float = 1.0, softcap: float | None = None
) -> jax.Array:
    """hidden [..., embed] times table [embed, vocab] -> float32 [..., vocab]; padding ids (>= vocab_size) get MASKED.

    The others are multiplied by `scale`; with `softcap` they become softcap tanh(logits / softcap).
    """
    if scale != 1:
        hidden = hidden * jnp.asarray(scale, hidden.dtype)
    out = project(hidden, table, 1, jnp.float32)
    if softcap is not None:
        out = softcap * jnp.tanh(out / softcap)
    if table.shape[-1] == vocab_size:
        return out
    ids = jax.lax.broadcasted_iota(jnp.int32, out.shape, out.ndim - 1)
    return jnp.where(ids < vocab_size, out, MASKED)
