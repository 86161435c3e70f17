"""The machines that `llmjax plan` compiles for: TPU slices, present or not, and the CPU and GPUs of this machine."""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import importlib.util
import math
import re
from typing import Any

from llmjax.errors import UserError, suggest
from llmjax.parallel.device_facts import peak_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What the cost model needs to know of one JAX device of a TPU generation. Bytes and rates per second.

    kind             `jax.Device.device_kind`
    config           the compiler's name of how a chip's cores are joined
    hbm              bytes that a program may use
    hbm_rate         bytes of HBM, as specified
    link_rate        bytes that one ICI link sends one way; a torus axis has two links
    axes             axes of the torus
    dcn_rate         bytes that a chip sends to other slices
    clock            cycles, as the compiler counts them
    matmul_share     usual share of the peak that matmuls reach in training steps; None: not measured
    int8_speedup     how much faster matmuls of int8 are than those of bfloat16
    elementwise      how much longer other operations take than their HBM traffic at 90% of hbm_rate
    attention_cycles cycles of the splash attention kernels per (query, key) element: forward, backward
    segment_cycles   what segment ids add to the two
    attention_cores  cores that share the heads
    """

    kind: str
    config: str = "default"
    hbm: int
    hbm_rate: float
    link_rate: float
    axes: int
    dcn_rate: float = 6.2e9
    clock: float | None = None
    matmul_share: float | None = None
    int8_speedup: float = 1.0
    elementwise: float = 1.0
    attention_cycles: tuple[float, float] | None = None
    segment_cycles: tuple[float, float] = (1.4e-3, 0.2e-3)
    attention_cores: int = 1

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOPs per second."""
        peak = peak_flops(self.kind)
        assert peak is not None, self.kind
        return peak


def _gib(size: float) -> int:
    return int(size * 2**30)


# HBM: what the compiler of libtpu 0.0.52 gives a program. Rates: Google Cloud's page of each TPU; links: "How to Scale
# Your Model" (Austin et al., 2025), chapter TPUs. Clocks follow from peak = clock x MXUs x rows x columns x 2. Shares
# and kernel cycles: docs/plan.md says how they were found. The speedups of int8 are the
# compiler's, by tools/matmul_cycles.py; v6e's data sheet has 2. A tpu7x chip is two JAX devices, which share its links.
CHIPS = {
    "v4": Chip(kind="TPU v4", config="megacore", hbm=_gib(30.75), hbm_rate=1.228e12, link_rate=45e9, axes=3),
    "v5e": Chip(
        kind="TPU v5e",
        hbm=_gib(15.75),
        hbm_rate=8.19e11,
        link_rate=45e9,
        axes=2,
        clock=1.5e9,
        matmul_share=0.80,
        int8_speedup=2.0,
        attention_cycles=(4.6e-3, 8.7e-3),
    ),
    "v5p": Chip(
        kind="TPU v5p",
        config="megacore",
        hbm=_gib(95.73),
        hbm_rate=2.765e12,
        link_rate=90e9,
        axes=3,
        clock=1.75e9,
        matmul_share=0.96,
        int8_speedup=2.0,
        elementwise=1.5,
        attention_cycles=(4.56e-3, 8.72e-3),
        attention_cores=2,
    ),
    "v6e": Chip(
        kind="TPU v6e",
        hbm=_gib(31.24),
        hbm_rate=1.64e12,
        link_rate=90e9,
        axes=2,
        clock=1.75e9,
        matmul_share=0.83,
        int8_speedup=1.3,
        elementwise=1.5,
        attention_cycles=(3.31e-3, 5.35e-3),
    ),
    "tpu7x": Chip(kind="TPU7x", hbm=_gib(94.74), hbm_rate=3.69e12, link_rate=50e9, axes=3),
}
# jax.Device.device_kind -> name; the runtime and the compiler have more than one kind for some chips.
_KINDS = {chip.kind: name for name, chip in CHIPS.items()}
_KINDS |= {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
_EXAMPLES = "v5e:2x4, v5p:4x4x4, v6e:16x16"
NAMES = (*CHIPS, "cpu", "gpu")
INSTALL = "pip install 'llmjax[plan]'"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to compile for.

    platform  "tpu", "cpu" or "gpu"
    name      as the user wrote it
    chip      of a TPU; None: the cost model does not know the hardware
    dims      chips of a slice along each axis of the torus; (devices,) on CPU; () on GPU: all that this machine has
    slices    copies of it, joined by the data centre's network
    """

    platform: str
    name: str
    chip: Chip | None
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.dims) * self.slices

    @property
    def chip_devices(self) -> int:
        """JAX devices of a chip."""
        return 2 if self.chip is CHIPS["tpu7x"] else 1


def parse(name: str, slices: int = 1) -> Topology:
    """The topology of `--topology` and `--slices`. Raises UserError for an unknown one."""
    flag, (kind, _, shape) = f"--topology={name}", name.partition(":")
    if kind not in NAMES:
        known = ", ".join(NAMES)
        raise UserError(f"{flag}{suggest(kind, NAMES)}: choose one of {known}, with its shape, such as {_EXAMPLES}")
    if not re.fullmatch(r"\d+(x\d+)*" if kind in CHIPS else r"\d*", shape) or re.search(r"(^|x)0", shape):
        raise UserError(f"{flag}: expected {'CHIP:AxB or CHIP:AxBxC' if kind in CHIPS else kind + ':DEVICES'}")
    dims = tuple(int(size) for size in shape.split("x") if size)
    if kind not in CHIPS:
        if slices != 1:
            raise UserError(f"--slices={slices}: {kind} has no slices; leave it out")
        if kind == "gpu" and dims:
            raise UserError(f"{flag}: GPUs are compiled for where they are; write --topology=gpu on such a machine")
        return Topology(kind, name, None, dims or ((1,) if kind == "cpu" else ()))
    chip = CHIPS[kind]
    if len(dims) != chip.axes:
        example = next(text for text in (*_EXAMPLES.split(", "), "v4:4x4x4", "tpu7x:4x4x4") if text.startswith(kind))
        raise UserError(f"{flag}: {kind} has {chip.axes} axes, such as {example}")
    _check_hosts(flag, dims)
    return Topology("tpu", name, chip, dims, slices)


def of_devices(devices: Sequence[Any]) -> Topology:
    """The topology that the devices of a job form. Raises UserError where they are no whole slices of a known chip."""
    first = devices[0]
    if first.platform != "tpu":
        return parse("gpu") if first.platform == "gpu" else parse(f"cpu:{len(devices)}")
    kind = _KINDS.get(first.device_kind)
    if kind is None:
        raise UserError(f"device_kind={first.device_kind!r}: the planner knows {', '.join(CHIPS)}")
    slices: dict[int, set[tuple[int, ...]]] = {}
    for device in devices:
        coords = slices.setdefault(getattr(device, "slice_index", None) or 0, set())
        coords.add(tuple(device.coords)[: CHIPS[kind].axes])
    shapes = {tuple(max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True)) for coords in slices.values()}
    shape = "x".join(map(str, min(shapes)))
    if len(shapes) > 1 or any(len(coords) != math.prod(min(shapes)) for coords in slices.values()):
        raise UserError(f"the {len(devices)} devices of {kind} form no whole slices of one shape (the first: {shape})")
    topology = parse(f"{kind}:{shape}", len(slices))
    if len(devices) != topology.num_chips * topology.chip_devices:
        raise UserError(f"{len(devices)} devices are not those of {len(slices)} x {topology.name}")
    return topology


def _check_hosts(flag: str, dims: Sequence[int]) -> None:
    """A host has 2 x 2 chips, or a single one."""
    if math.prod(dims) > 1 and (dims[0] % 2 or dims[1] % 2):
        raise UserError(f"{flag}: a host has 2x2 chips; make the first two sizes even, or both 1")


def check_installed(topology: Topology) -> None:
    """Raise UserError where the compiler of the topology's platform is not installed."""
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name}: the TPU compiler (libtpu) is not installed: run `{INSTALL}`; no TPU is needed"
        )


def compiler_version(topology: Topology) -> str:
    """The package that compiles, with its version."""
    package = "libtpu" if topology.platform == "tpu" else "jaxlib"
    return f"{package} {importlib.metadata.version(package)}"


def devices(topology: Topology) -> list[Any]:
    """The JAX devices to compile for, of all slices. Raises UserError where the compiler refuses the shape.

    A TPU's need not be present. On CPU and GPU they are those of this process, which must have been started with them.
    """
    if topology.platform != "tpu":
        import jax

        try:
            return jax.devices(topology.platform)
        except RuntimeError:
            raise UserError(f"--topology={topology.name}: JAX finds no {topology.platform} on this machine") from None
    from jax.experimental import topologies

    assert topology.chip is not None
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology.name,
            chip_config_name=topology.chip.config,
            chips_per_host_bounds=(min(2, topology.dims[0]), min(2, topology.dims[1]), 1),
            num_slices=topology.slices,
            wrap=wrap(topology.dims),
        ).devices
    except Exception as error:
        message = str(error).partition("\n")[0][:200]
        raise UserError(f"--topology={topology.name}: the compiler refuses this shape ({message})") from None


def wrap(dims: Sequence[int]) -> tuple[bool, bool, bool]:
    """Which axes of a slice close to a ring: of a 3D slice all if they are multiples of 4 (whole cubes), of a 2D slice
    those of 16.

    It decides which collectives the compiler chooses: without rings, a v5p program gets its all-gathers as all-reduces.
    """
    if len(dims) == 3:
        closed = all(size % 4 == 0 for size in dims)
        return (closed, closed, closed)
    return (dims[0] >= 16, dims[1] >= 16, False)
