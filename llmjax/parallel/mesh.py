"""The device mesh: named axes over all devices of all processes."""

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.errors import UserError
from llmjax.parallel import axes, hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices. One axis may be -1: all remaining devices.

    slice      TPU slices, joined by the data centre's network; replicas that split the batch
    data       replicas that split the batch
    fsdp       shards of parameters and optimizer state, which split the batch as well. 0: the start of a run chooses
               1 where a third of a device's memory holds the training state, else all devices
    expert     shards of a mixture's experts, which split the batch as well
    sequence   shards of the positions of a row, and of parameters and optimizer state
    tensor     shards of heads, mlp and vocabulary
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the step is compiled.

    backend       "jit" shards by the rules; "pmap" maps the step over replicas (data axis only)
    rules         (logical axis, mesh axis | tuple of mesh axes | None), ...; a missing axis keeps its default
    gradient_dtype  type in which the gradients of dense layers and of the head are computed and added over devices: ""
                  (the type of activations; the head: float32), float32 (more exact, twice the bytes of bfloat16
                  activations) or bfloat16. The small ones (norms, biases), those of experts and of token lookups keep
                  the type of their computation. With pmap, all are added in it
    reduction     the order in which gradients, losses and metrics are summed over the batch: "xla" (the compiler's,
                  which depends on the mesh) or "fixed_tree" (the same on any number of devices that virtual_shards
                  allows, and so the same bits; docs/exactness.md)
    virtual_shards  fixed_tree: parts of the global batch, a power of two; data x fsdp may be 1, 2, 4, ... up to it
    cpu_threads   size of XLA's thread pool on CPU, in each process. XLA splits matrix products by it, so it changes the
                  last bits of results: it does not follow the cores or devices, and is at least the CPU devices of a
                  process. Accelerators ignore it
    """

    backend: str = "jit"
    rules: tuple = axes.DEFAULT_RULES
    gradient_dtype: str = ""
    reduction: str = "xla"
    virtual_shards: int = 0
    cpu_threads: int = hosts.CPU_THREADS

    def __post_init__(self):
        if self.gradient_dtype not in ("", "float32", "bfloat16"):
            raise UserError(f"parallel.gradient_dtype={self.gradient_dtype!r}: choose one of '', float32, bfloat16")
        if self.reduction not in ("xla", "fixed_tree"):
            raise UserError(f"parallel.reduction={self.reduction!r}: choose one of xla, fixed_tree")
        if self.virtual_shards < 0 or self.virtual_shards & (self.virtual_shards - 1):
            raise UserError(f"parallel.virtual_shards={self.virtual_shards}: must be a power of two, such as 8, or 0")
        if self.cpu_threads < 1:
            raise UserError(f"parallel.cpu_threads={self.cpu_threads}: must be 1 or more")
        object.__setattr__(self, "rules", axes.complete_rules(self.rules))


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Axis sizes with -1 resolved. Raises UserError where they do not match the devices."""
    sizes = dataclasses.asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    bad = {name: size for name, size in sizes.items() if size < 1 and size != -1}
    described = f"mesh={dict((name, size) for name, size in sizes.items() if size != 1 or name == 'data')}"
    if bad or len(free) > 1:
        raise UserError(f"{described}: set sizes of 1 or more, and at most one of them to -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed:
        raise UserError(
            f"{described}: {fixed} does not divide the {num_devices} devices; change a size other than mesh.{free[0]}"
        )
    if not free and fixed != num_devices:
        raise UserError(
            f"{described} needs {fixed} devices, but there are {num_devices}: change mesh.data, mesh.fsdp or another "
            "size, or set one of them to -1"
        )
    return {name: num_devices // fixed if size == -1 else size for name, size in sizes.items()}


# The axes that every mesh has. Another one of size 1 is left out, so that programs are those of a mesh without it.
_ALWAYS_PRESENT = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes, ordered by the topology of the hardware where it has one.

    devices   the devices of a topology to compile for, which need not be present; None: all devices of the job

    The axes slice, expert and sequence are absent where their size is 1. Raises UserError for sizes that do not match
    the devices or their slices. A collective in a job of several processes, unless `devices` are given: all of them
    call it, and are connected when it returns.
    """
    of_job = devices is None
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(config, len(devices))
    sizes = {name: size for name, size in sizes.items() if size > 1 or name in _ALWAYS_PRESENT}
    mesh = Mesh(_arrange(sizes, devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    if of_job and jax.process_count() > 1 and jax.default_backend() == "cpu":
        _connect(mesh)
    return mesh


def _arrange(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in an array of the mesh's shape; those of one index along "slice" are one TPU slice."""
    num_slices, slices = sizes.get("slice", 1), len({getattr(device, "slice_index", 0) for device in devices})
    if slices != num_slices and devices[0].platform == "tpu":
        raise UserError(f"mesh.slice={num_slices}: the devices are {slices} TPU slices; set mesh.slice={slices}")
    inside = tuple(1 if name == "slice" else size for name, size in sizes.items())
    across = tuple(size if name == "slice" else 1 for name, size in sizes.items())
    try:
        if slices == 1 or slices != num_slices:  # one slice, emulated slices, or GPU hosts, which JAX calls slices
            return mesh_utils.create_device_mesh(tuple(sizes.values()), devices)
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices)
    except NotImplementedError as error:
        torus = "x".join(str(1 + max(place)) for place in zip(*(device.coords for device in devices), strict=True))
        raise UserError(
            f"mesh={sizes}: the devices are a torus of {torus}; set each size to the product of some of its dimensions"
        ) from error


def _connect(mesh: Mesh) -> None:
    """Let gloo connect the processes along every set of mesh axes, before a large program is compiled.

    Gloo connects the devices of a group when the first program that sums over the group runs, and a process that
    waits 30 s for another one there ends. The other one may still be compiling the program. So a program that
    compiles quickly makes the connections, once all processes have compiled it. Later programs use these connections;
    a process may wait in them as long as the heartbeat allows.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for count in range(1, len(names) + 1) for group in itertools.combinations(names, count)]

    def add_over_all_groups(x: jax.Array) -> jax.Array:
        for group in groups:  # each sum depends on the one before, so that all processes run them in the same order
            x = jax.lax.psum(x, group)
        return x

    program = jax.jit(jax.shard_map(add_over_all_groups, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    one = jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda index: np.float32(1))
    compiled = program.lower(one).compile()
    hosts.barrier("connect")
    jax.block_until_ready(compiled(one))
