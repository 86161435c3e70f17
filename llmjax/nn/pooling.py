"""Pooling: one vector for each text, from the hidden states of its tokens."""

import jax
import jax.numpy as jnp


def pool(hidden: jax.Array, is_token: jax.Array, pooling: str) -> jax.Array:
    """hidden [batch, seq, embed], bool is_token [batch, seq] -> float32 [batch, embed].

    pooling   one of `data.config.POOLINGS`: mean (of the hidden states of the tokens), first, last (that of one token)
              or max (of each dimension)

    The vector of a row without tokens is finite and has no meaning.
    """
    hidden = hidden.astype(jnp.float32)
    if pooling in ("first", "last"):
        positions = jnp.arange(hidden.shape[1])
        at = jnp.argmax(is_token, axis=1) if pooling == "first" else jnp.max(positions * is_token, axis=1)
        return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    is_token = is_token[..., None]
    if pooling == "max":
        highest = jnp.max(jnp.where(is_token, hidden, -jnp.inf), axis=1)
        return jnp.where(jnp.any(is_token, axis=1), highest, 0)
    return jnp.sum(jnp.where(is_token, hidden, 0), axis=1) / jnp.maximum(jnp.sum(is_token, axis=1), 1)
