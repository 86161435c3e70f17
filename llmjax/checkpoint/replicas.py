"""Compare the copies of replicated arrays: they differ where a device computed, stored or received wrong bits."""

import collections
from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.checkpoint.fingerprint import leaf_sum, seed_of
from llmjax.errors import HardwareError
from llmjax.parallel import hosts
from llmjax.parallel.axes import used_axes


def check_replicas(tree: Any) -> None:
    """Raise HardwareError, naming the devices, where the copies of a part of the state are not equal bit for bit.

    tree   arrays with shardings of the mesh of `use_mesh`

    Reads each array that has copies once, so it costs as much as a fingerprint; arrays that are sharded over all
    devices have none and cost nothing. A collective: all processes call it, and all of them raise.
    """
    mesh = jax.sharding.get_mesh()
    sums: dict[tuple[str, ...], list[jax.Array]] = collections.defaultdict(list)  # by the axes along which copies lie
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if axes := _replica_axes(leaf.sharding.spec, mesh):
            sums[axes].append(_device_sums(mesh, leaf.sharding.spec)(seed_of(path), leaf))
    if not sums:
        return
    totals = np.asarray(_add_and_gather(mesh)(list(sums.values())))
    odd = sorted({index for axes, total in zip(sums, totals, strict=True) for index in _odd_devices(mesh, axes, total)})
    raise_on_differences(odd, "the copies of the training state differ")


def device_digests(tree: Any) -> np.ndarray:
    """uint32 [devices of the mesh, in its order]: a hash of the parts of all arrays that each device holds.

    tree   arrays with shardings of the mesh of `use_mesh`
    A collective, as `check_replicas`.
    """
    mesh = jax.sharding.get_mesh()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [_device_sums(mesh, leaf.sharding.spec)(seed_of(path), leaf) for path, leaf in leaves]
    return np.asarray(_add_and_gather(mesh)([sums]))[0]


def raise_on_differences(odd: list[int], problem: str) -> None:
    """Raise HardwareError that names the devices with these flat indices in the mesh, if any. All processes call it."""
    if not odd:
        return
    hosts.barrier("bits differ")  # the end of a process would break the collective of one that still reads
    devices = [jax.sharding.get_mesh().devices.flat[index] for index in odd]
    names = ", ".join(f"device {device.id} of process {device.process_index}" for device in devices)
    raise HardwareError(
        f"{problem}: {names}; nothing is saved. Examine the hardware, or leave these devices out; rerun the same "
        "command to resume from the newest checkpoint"
    )


def _replica_axes(spec: P, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which an array of this spec has copies."""
    used = used_axes(spec)
    return tuple(name for name, size in mesh.shape.items() if size > 1 and name not in used)


@functools.cache
def _device_sums(mesh: Mesh, spec: P) -> Callable:
    """A function (seed, array) -> uint32 [devices]: a hash of the part that each device holds. No collective."""

    def local(seed: jax.Array, part: jax.Array) -> jax.Array:
        return leaf_sum(seed, part)[None]

    # Without check_vma each device reads its own copy.
    every_device = P(mesh.axis_names)
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(), spec), out_specs=every_device, check_vma=False),
    )


@functools.cache
def _add_and_gather(mesh: Mesh) -> Callable:
    """A function: lists of uint32 [devices] -> uint32 [lists, devices], the sum of each list, on every device."""
    add = lambda lists: jax.numpy.stack([functools.reduce(jax.numpy.add, sums) for sums in lists])
    return jax.jit(add, out_shardings=NamedSharding(mesh, P()))


def _odd_devices(mesh: Mesh, axes: tuple[str, ...], sums: np.ndarray) -> list[int]:
    """Flat indices of the devices whose copy is not that of most; of all its holders where no copy has a majority.

    axes   along which the copies lie
    sums   uint32 [devices]
    """
    copies = [mesh.axis_names.index(name) for name in axes]
    others = [axis for axis in range(len(mesh.axis_names)) if axis not in copies]
    sizes = [mesh.devices.shape[axis] for axis in copies]
    order = np.arange(sums.size).reshape(mesh.devices.shape).transpose(*others, *copies).reshape(-1, np.prod(sizes))
    odd: list[int] = []
    for holders in order:
        values, counts = np.unique(sums[holders], return_counts=True)
        if len(values) > 1:
            majority = values[counts.argmax()] if 2 * counts.max() > len(holders) else None
            odd += [int(index) for index in holders if majority is None or sums[index] != majority]
    return odd
