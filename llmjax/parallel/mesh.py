"""The device mesh: named axes over all devices of all processes."""

import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmjax.config import UserError
from llmjax.parallel import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices. One axis may be -1: all the rest.

    data     replicas that split the batch
    fsdp     shards of parameters and optimizer state, which split the batch as well
    tensor   shards of heads, mlp and vocabulary
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the step is compiled.

    how     "jit" shards by the rules; "pmap" maps the step over replicas (data axis only)
    rules   (logical axis, mesh axis | tuple of mesh axes | None), ...; an axis that is left out keeps its default
    """

    how: str = "jit"
    rules: tuple = axes.DEFAULT_RULES

    def __post_init__(self):
        object.__setattr__(self, "rules", axes.complete_rules(self.rules))


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Axis sizes with -1 resolved. Raises UserError where they do not match the devices."""
    sizes = dataclasses.asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    bad = {name: size for name, size in sizes.items() if size < 1 and size != -1}
    if bad or len(free) > 1:
        raise UserError(f"mesh={sizes}: sizes are positive, and at most one is -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed:
        raise UserError(
            f"mesh={sizes}: {fixed} does not divide the {num_devices} devices; change mesh.{free[0]}'s partners"
        )
    if not free and fixed != num_devices:
        raise UserError(
            f"mesh={sizes} needs {fixed} devices, but there are {num_devices}: "
            "change mesh.data, mesh.fsdp or mesh.tensor, or set one of them to -1"
        )
    return {name: num_devices // fixed if size == -1 else size for name, size in sizes.items()}


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices of all processes, neighbours kept together where the hardware has a topology."""
    sizes = mesh_shape(config, jax.device_count())
    devices = mesh_utils.create_device_mesh(tuple(sizes.values()), jax.devices())
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
