"""Relative position bias: a learned, bucketed bias on attention scores by distance."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.nn import weights
from llmjax.parallel.axes import constrain


def buckets(num_buckets: int, max_distance: int, *, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance (key minus query) from -max_distance to max_distance; int32 [2 max_distance + 1].

    Half of a direction's buckets have one distance each. The others grow geometrically up to `max_distance`, and the
    last one has all greater distances. If `bidirectional`, keys after their query have the upper half of the buckets;
    otherwise such keys, which are masked, share the bucket of distance 0. (Raffel et al., 2020, arXiv 1910.10683)
    """
    per_direction = num_buckets // 2 if bidirectional else num_buckets
    exact = per_direction // 2
    steps = per_direction - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        # distance / exact >= (max_distance / exact)^(k / steps), in integers: with logarithms, rounding would decide at
        # the edge of a bucket, differently on each kind of device.
        passed = [distance**steps * exact**k >= max_distance**k * exact**steps for k in range(1, steps)]
        return exact + sum(passed)

    before = np.array([bucket(distance) for distance in range(max_distance + 1)], np.int32)
    after = per_direction + before[1:] if bidirectional else np.zeros(max_distance, np.int32)
    return np.concatenate([before[::-1], after])


class RelativeBias(nnx.Module):
    """Positions of queries and keys -> bias of their scores; all layers of a stack share one table."""

    def __init__(
        self,
        key: jax.Array,
        num_heads: int,
        *,
        num_buckets: int,
        max_distance: int,
        bidirectional: bool,
        std: float,
        dtype: str,
    ):
        self.table = weights.normal(key, {"entries": num_buckets, "heads": num_heads}, std=std, dtype=dtype)
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """queries int [batch, s], keys int [batch or 1, t] -> bias float32 [batch, heads, s, t]."""
        limit = self.max_distance
        distance = jnp.clip(keys[:, None, :] - queries[:, :, None], -limit, limit)
        bias = jnp.moveaxis(jnp.take(self._by_distance(), distance + limit, axis=1), 0, 1)
        return constrain(bias, "batch", "heads", "seq", None)

    def by_distance(self, seq: int) -> jax.Array:
        """The bias of each distance (key minus query) from 1 - seq to seq - 1: float32 [heads, 2 seq - 1]."""
        limit = self.max_distance
        distance = np.clip(np.arange(1 - seq, seq), -limit, limit)
        return constrain(self._by_distance()[:, distance + limit], "heads", None)

    def _by_distance(self) -> jax.Array:
        """The bias of each distance from -max_distance to max_distance: float32 [heads, 2 max_distance + 1]."""
        bucket_of = buckets(self.num_buckets, self.max_distance, bidirectional=self.bidirectional)
        return self.table[...].astype(jnp.float32).T[:, bucket_of]
