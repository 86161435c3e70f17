"""Faults that tests inject."""

import jax
import numpy as np


def flip_a_bit(x: jax.Array, device: int) -> jax.Array:
    """The array with the lowest bit of its first element flipped in the copy of one device of this process."""
    parts = []
    for shard in x.addressable_shards:
        values = np.array(shard.data)
        if shard.device.id == device:
            values.reshape(-1).view(np.uint32)[0] ^= 1
        parts.append(jax.device_put(values, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
