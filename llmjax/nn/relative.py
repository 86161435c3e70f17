"""Relative position bias: a learned, bucketed bias on attention scores by distance."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.nn import weights
from llmjax.parallel.axes import constrain


def buckets(num_buckets: int, max_distance: int, *, both_ways: bool) -> np.ndarray:
    """The bucket of each distance (key minus query) from -max_distance to max_distance; int32 [2 max_distance + 1].

    Half of a direction's buckets hold one distance each; the others grow as a geometric series up to `max_distance`,
    and the last holds all that lies beyond. `both_ways` gives keys after their query the upper half of the buckets;
    without it such keys, which nothing sees, share the bucket of distance 0. (Raffel et al., 2020, arXiv 1910.10683)
    """
    own = num_buckets // 2 if both_ways else num_buckets
    exact = own // 2
    steps = own - exact

    def bucket(far: int) -> int:
        if far < exact:
            return far
        # far / exact >= (max_distance / exact)^(k / steps), in whole numbers: no rounding decides at a bucket's edge,
        # neither here nor, as a logarithm would, on each kind of device anew.
        reached = [far**steps * exact**k >= max_distance**k * exact**steps for k in range(1, steps)]
        return exact + sum(reached)

    one_way = np.array([bucket(far) for far in range(max_distance + 1)], np.int32)
    after = own + one_way[1:] if both_ways else np.zeros(max_distance, np.int32)
    return np.concatenate([one_way[::-1], after])


class RelativeBias(nnx.Module):
    """Positions of queries and keys -> what is added to their scores; one table serves all layers of a stack."""

    def __init__(
        self,
        key: jax.Array,
        num_heads: int,
        *,
        num_buckets: int,
        max_distance: int,
        both_ways: bool,
        std: float,
        dtype: str,
    ):
        self.table = weights.normal(key, {"seq": num_buckets, "heads": num_heads}, std=std, dtype=dtype)
        self.num_buckets, self.max_distance, self.both_ways = num_buckets, max_distance, both_ways

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """queries int [batch, s], keys int [batch or 1, t] -> bias float32 [batch, heads, s, t]."""
        reach = self.max_distance
        by_distance = (
            self.table[...].astype(jnp.float32).T[:, buckets(self.num_buckets, reach, both_ways=self.both_ways)]
        )
        distance = jnp.clip(keys[:, None, :] - queries[:, :, None], -reach, reach)
        bias = jnp.moveaxis(jnp.take(by_distance, distance + reach, axis=1), 0, 1)
        return constrain(bias, "batch", "heads", None, None)
