"""Transfer between files and sharded arrays without a full copy in host memory."""

import functools
import logging
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.interop.mapping import ParamMapping, Source, Tensor

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0


class Progress:
    """A line now and then: how much of `total` bytes is done, the rate and the time left."""

    def __init__(self, what: str, total: int):
        self._what, self._total = what, total
        self._done, self._began = 0, time.monotonic()
        self._last = self._began

    def add(self, nbytes: int) -> None:
        """So much more is done."""
        self._done += nbytes
        now = time.monotonic()
        if now - self._last > EVERY_SECONDS:
            self._last, rate = now, self._done / (now - self._began)
            left = max(self._total - self._done, 0) / rate
            logger.info("%s: %.2f of %.2f GB, %.0f s left", self._what, self._done / 1e9, self._total / 1e9, left)


def read(table: ParamMapping, source: Source, shardings: dict[str, NamedSharding]) -> dict[str, Any]:
    """The parameters as sharded arrays. Every process reads what its own devices hold, each part of it once."""
    sizes = {name: _local_bytes(leaf, shardings[name]) for name, leaf in table.shapes.items()}
    progress = Progress("reading", sum(sizes.values()))
    return table.tree({name: _read_array(table, source, name, shardings[name], progress) for name in table.shapes})


def _parts(shape: tuple[int, ...], sharding: NamedSharding) -> dict[tuple, list[Any]]:
    """(start, stop) for each dimension -> this process's devices that hold that part."""
    parts: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        parts.setdefault(key, []).append(device)
    return parts


def _local_bytes(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
    parts = _parts(leaf.shape, sharding)
    return leaf.dtype.itemsize * sum(math.prod(stop - start for start, stop in part) for part in parts)


def _read_array(
    table: ParamMapping, source: Source, name: str, sharding: NamedSharding, progress: Progress
) -> jax.Array:
    shape, arrays = table.shapes[name].shape, []
    for part, devices in _parts(shape, sharding).items():
        shard = table.read(name, tuple(slice(*ends) for ends in part), source)
        # Waited for one by one, so that no more than one shard is on the host beside what the devices hold.
        arrays += [jax.block_until_ready(jax.device_put(shard, device)) for device in devices]
        progress.add(shard.nbytes)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


class Parameters:
    """Sharded parameters, handed out tensor by tensor as numpy arrays. A collective: all processes ask alike."""

    def __init__(self, table: ParamMapping, params: dict):
        self._table, self._arrays = table, table.flat(params)

    def tensor(self, tensor: Tensor, dtype: Any) -> np.ndarray:
        """A tensor as it lies on disk, in `dtype`."""
        return self._table.write(tensor, lambda name, at: self._part(name, at, dtype))

    def _part(self, name: str, at: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = self._arrays[name]
        # In one process the shards are put together on the host; several need a copy that each of them can read.
        whole = None if jax.process_count() == 1 else NamedSharding(array.sharding.mesh, P())
        return np.asarray(_pick(array, tuple(map(jnp.int32, at)), whole, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("sharding", "dtype"))
def _pick(array: jax.Array, at: tuple[jax.Array, ...], sharding: NamedSharding | None, dtype: Any) -> jax.Array:
    for i in at:
        array = jax.lax.dynamic_index_in_dim(array, i, axis=0, keepdims=False)
    array = array.astype(dtype)
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)
