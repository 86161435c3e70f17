"""Transfer between tensor files and sharded arrays without a full copy in host memory."""

from collections.abc import Mapping
import functools
import logging
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.batch import Params
from llmjax.interop.mapping import ParamMapping, Source, Tensor, flatten

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Logs every few seconds how much of `total` bytes is done, and the time left."""

    def __init__(self, action: str, total: int):
        self._action, self._total = action, total
        self._done, self._started = 0, time.monotonic()
        self._last_line = self._started

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more bytes as done."""
        self._done += nbytes
        now = time.monotonic()
        if now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            seconds_left = max(self._total - self._done, 0) * (now - self._started) / self._done
            logger.info(
                "%s: %.2f of %.2f GB, %.0f s left", self._action, self._done / 1e9, self._total / 1e9, seconds_left
            )


def read(
    table: ParamMapping, source: Source, shardings: dict[str, NamedSharding], initial: Mapping[str, jax.Array]
) -> Params:
    """The parameters as sharded arrays, those of `initial` from there.

    Every process reads what its own devices hold, each part once.
    """
    shapes = {name: leaf for name, leaf in table.shapes.items() if name not in initial}
    progress = Progress("reading", sum(_count_local_bytes(leaf, shardings[name]) for name, leaf in shapes.items()))
    read = {name: _read_array(table, source, name, shardings[name], progress) for name in shapes}
    return table.unflatten({**read, **initial})


def _list_parts(shape: tuple[int, ...], sharding: NamedSharding) -> dict[tuple, list[Any]]:
    """(start, stop) for each dimension -> this process's devices that hold that part."""
    parts: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        parts.setdefault(key, []).append(device)
    return parts


def _count_local_bytes(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
    parts = _list_parts(leaf.shape, sharding)
    return leaf.dtype.itemsize * sum(math.prod(stop - start for start, stop in part) for part in parts)


def _read_array(
    table: ParamMapping, source: Source, name: str, sharding: NamedSharding, progress: Progress
) -> jax.Array:
    shape, arrays = table.shapes[name].shape, []
    for part, devices in _list_parts(shape, sharding).items():
        shard = table.read(name, tuple(slice(*bounds) for bounds in part), source)
        # Wait for each transfer, so that the host never holds more than one shard besides what the devices hold.
        arrays += [jax.block_until_ready(jax.device_put(shard, device)) for device in devices]
        progress.add(shard.nbytes)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


class TensorGatherer:
    """Gathers sharded parameters into Hugging Face tensors, one at a time. A collective: all processes take part."""

    def __init__(self, table: ParamMapping, params: Params):
        self._table, self._arrays = table, flatten(params)

    def gather(self, tensor: Tensor, dtype: Any) -> np.ndarray:
        """One tensor as it is stored in a file, in `dtype`."""
        return self._table.to_hf(tensor, lambda name, index: self._gather_layer(name, index, dtype))

    def _gather_layer(self, name: str, index: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = self._arrays[name]
        # One process assembles the shards on the host; several processes need a replicated copy that each can read.
        replicated = None if jax.process_count() == 1 else NamedSharding(array.sharding.mesh, P())
        return np.asarray(_index_layer(array, tuple(map(jnp.int32, index)), replicated, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("sharding", "dtype"))
def _index_layer(array: jax.Array, index: tuple[jax.Array, ...], sharding: NamedSharding | None, dtype: Any):
    for i in index:
        array = jax.lax.dynamic_index_in_dim(array, i, axis=0, keepdims=False)
    array = array.astype(dtype)
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)
