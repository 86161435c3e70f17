"""Dropout keyed by sample: the same on any mesh, replica, host or microbatch."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout with one key for each row; without keys it does nothing.

    keys   [batch] typed keys, or None
    rate   fraction of the values that is set to 0; the others are divided by 1 - rate
    """

    keys: jax.Array | None
    rate: float = dataclasses.field(metadata={"static": True})

    def at(self, site: int | jax.Array) -> "Dropout":
        """The dropout of one layer, or of one site in a layer: the keys are folded with its number."""
        if self.keys is None:
            return self
        return Dropout(jax.vmap(lambda key: jax.random.fold_in(key, site))(self.keys), self.rate)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, ...] -> same."""
        if self.keys is None:
            return x
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(self.keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def for_samples(key: jax.Array | None, sample: jax.Array, rate: float) -> Dropout:
    """Dropout keyed by `key` and the global sample indices, uint32 [batch, 2] (high and low word). None: no dropout."""
    if key is None or rate == 0:
        return Dropout(None, rate)
    fold = lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])
    return Dropout(jax.vmap(fold)(sample), rate)
