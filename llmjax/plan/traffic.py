"""Bytes that a compiled program moves: between chips (ICI), between slices (DCN), to the host, and to HBM."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re

import numpy as np

from llmjax.plan.hlo import ASYNC_START, HOST_SPACE, Array, Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They make no traffic of their own: names for other buffers, or control flow whose body is counted instead.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "optimization-barrier", "copy-done", "async-done", "async-start", "async-update", "partition-id", "replica-id",
    "custom-call",
)  # fmt: skip
_SLICING = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program: wire bytes that a chip sends in one execution, by the ring algorithm.

    result_bytes   bytes of its result on a chip
    asynchronous   whether it ends at another instruction
    """

    kind: str
    result_bytes: int
    ici_bytes: float
    dcn_bytes: float
    asynchronous: bool = False


def collective(instruction: Instruction, module: Module, slice_of: Sequence[int]) -> Collective | None:
    """The collective that an instruction is or starts; None for another instruction.

    One that runs beside matmuls is written in several fusions, which share its channel: it counts where it starts.

    slice_of   partition of the program -> the slice that its chip is in
    """
    if instruction.opcode == "send":
        return _between_slices(instruction, len(set(slice_of)))
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or instruction.opcode.endswith("-done"):
        return None
    starts = _START in module.targets[instruction.computation]
    if not starts and instruction.channel in module.started_channels:
        return None
    result = sum(array.bytes for array in _results(instruction))
    asynchronous = starts or instruction.opcode.endswith("-start")
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=(\{\{.*?\}\})"))
        moves = [(int(a), int(b)) for a, b in pairs if a != b]
        across = sum(slice_of[a] != slice_of[b] for a, b in moves)
        share = result / max(len(slice_of), 1)
        return Collective(kind, result, (len(moves) - across) * share, across * share, asynchronous)
    groups = replica_groups(instruction, len(slice_of))
    size = len(groups[0])
    slices = len({slice_of[member] for member in groups[0]})
    if instruction.computation.startswith(
        "all-reduce-scatter"
    ):  # a fusion of an all-reduce and the slice that it keeps
        kind, result = "reduce-scatter", result // size
    return Collective(kind, result, *_ring_bytes(kind, result, size, slices), asynchronous)


_START, _DONE = ASYNC_START, "AsyncCollectiveDone"


def async_fusion(fusion: Instruction, module: Module) -> tuple[str, str]:
    """("start" or "done", channel) of a fusion that starts or ends a collective; ("", "") of any other instruction."""
    if fusion.opcode != "fusion":
        return "", ""
    (callee,) = fusion.callees["calls"]
    roles = [role for role, marker in (("start", _START), ("done", _DONE)) if marker in module.targets[callee]]
    channels = [i.channel for i in module.computations[callee] if i.opcode in COLLECTIVES]
    return (roles[0], channels[0]) if roles and channels else ("", "")


def _between_slices(send: Instruction, slices: int) -> Collective | None:
    """The TPU compiler hands collectives between slices to the runtime, which gets this chip's part of the data."""
    kind = send.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
    if not kind:
        return None
    size = send.arrays[0].bytes
    shares = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1}
    share = shares.get(kind, (slices - 1) / slices if kind in ("reduce-scatter", "all-to-all") else 1)
    return Collective(f"{kind} between slices", size, 0.0, size * share)


def _results(instruction: Instruction) -> tuple[Array, ...]:
    """The arrays that a collective gives; a start operation returns its operands before them."""
    arrays = instruction.arrays
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        count = len(instruction.operands)
        return arrays[count : 2 * count]
    return arrays


def _ring_bytes(kind: str, result: int, size: int, slices: int) -> tuple[float, float]:
    """(ICI, DCN) bytes that a chip sends. Groups over several slices work inside each slice first."""
    whole = result * size if kind == "reduce-scatter" else result
    inside = size // slices
    if kind in ("all-to-all", "ragged-all-to-all"):
        return whole * (inside - 1) / size, whole * (size - inside) / size
    rounds = 2 if kind == "all-reduce" else 1
    ici = rounds * whole * (inside - 1) / inside
    dcn = rounds * (whole / inside) * (slices - 1) / slices
    return ici, dcn


def replica_groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """The groups of a collective, in any of XLA's three notations: lists, reshaped iotas, and axes of a mesh."""
    attributes = instruction.attributes
    if match := re.search(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", attributes):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(match[1]).tolist()
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{([^}]*)\}", attributes
    ):
        return _mesh_groups(match[1], match[2], match[3])
    return [list(range(partitions))]


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: numbers reshaped to [2,4], transposed, reshaped to [4,2]."""
    match = re.fullmatch(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    shape = _indices(match[1])
    source = _indices(match[2]) if match[2] else shape
    ids = np.arange(math.prod(source)).reshape(source)
    if match[3]:
        ids = ids.transpose(_indices(match[3]))
    return ids.reshape(shape) if match[2] else ids


def _mesh_groups(axes: str, device_ids: str | None, chosen: str) -> list[list[int]]:
    """Groups along axes of a mesh: `'a'=4,'b'=2`, the order of devices, and `'a'` or a part of it, `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = _iota(device_ids).ravel() if device_ids else np.arange(math.prod(sizes.values()))
    dims, groups = [], []
    parts = {name: (int(before or 0), int(size or 0)) for name, before, size in _axis_parts(chosen)}
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        before, part = (before, part) if part else (1, size)
        for length, inside in ((before, False), (part, True), (size // before // part, False)):
            if inside:
                groups.append(len(dims))
            dims.append(length)
    rest = [dim for dim in range(len(dims)) if dim not in groups]
    grid = ids.reshape(dims).transpose([*rest, *groups])
    return grid.reshape(-1, math.prod(dims[dim] for dim in groups)).tolist()


def _axis_parts(chosen: str) -> list[tuple[str, str, str]]:
    return re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)


def host_bytes(instruction: Instruction, module: Module) -> int:
    """Bytes of one execution that go to or from the host's memory: copies, and slices read or written there."""
    if instruction.opcode in _FREE or not instruction.arrays or not instruction.operands:
        return 0
    if instruction.opcode == "copy-start":  # (destination, source, context)
        destination, source = instruction.arrays[:2]
        return destination.bytes if (destination.space == HOST_SPACE) != (source.space == HOST_SPACE) else 0
    sources = module.operand_arrays(instruction)
    to_host = sum(array.bytes for array in instruction.arrays if array.space == HOST_SPACE)
    if to_host:
        written = [array.bytes for array in sources if array.space != HOST_SPACE and array.dims]
        return min(to_host, sum(written))  # a dynamic-update-slice writes its update alone
    from_host = sum(array.bytes for array in sources if array.space == HOST_SPACE)
    return min(from_host, sum(array.bytes for array in instruction.arrays))


def hbm_bytes(instruction: Instruction, module: Module) -> float:
    """Bytes that one execution reads from and writes to HBM. Slices of large buffers count as what they touch."""
    if instruction.opcode in _FREE or instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return 0.0
    if instruction.opcode.endswith("-done"):
        return 0.0
    written = sum(array.bytes for array in instruction.arrays if array.space == 0)
    if instruction.opcode == "copy-start":
        return sum(array.bytes for array in instruction.arrays[:2] if array.space == 0)
    if instruction.opcode in _SLICING:
        return 2.0 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * module.operand(instruction, 1).bytes
    if instruction.opcode == "fusion":
        (callee,) = instruction.callees["calls"]
        return sum(_fusion_reads(instruction, callee, module)) + _fusion_writes(instruction, callee, module)
    return written + sum(array.bytes for array in module.operand_arrays(instruction) if array.space == 0)


def _fusion_reads(fusion: Instruction, callee: str, module: Module) -> Iterator[float]:
    uses: dict[str, list[Instruction]] = {}
    for inner in module.computations[callee]:
        for operand in inner.operands:
            uses.setdefault(operand, []).append(inner)
    for inner in module.computations[callee]:
        if inner.opcode != "parameter":
            continue
        arrays = module.instructions[fusion.operands[int(inner.literal)]].arrays
        if len(arrays) != 1 or arrays[0].space != 0:
            continue
        yield min(arrays[0].bytes, sum(_read_by(user, inner, module) for user in uses.get(inner.name, ())))


def _read_by(user: Instruction, parameter: Instruction, module: Module) -> float:
    if user.opcode in _SLICING and user.operands[0] == parameter.name:
        return user.arrays[0].bytes
    if user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
        return 0
    return parameter.arrays[0].bytes


def _fusion_writes(fusion: Instruction, callee: str, module: Module) -> float:
    root = module.roots[callee]
    parts = [module.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.arrays):
        return sum(array.bytes for array in fusion.arrays if array.space == 0)
    total = 0
    for part, array in zip(parts, fusion.arrays, strict=True):
        while part.opcode in ("bitcast", "copy") and part.operands:
            part = module.instructions[part.operands[0]]
        if array.space == 0:
            is_update = part.opcode == "dynamic-update-slice"
            total += module.operand(part, 1).bytes if is_update else array.bytes
    return total


def _indices(text: str) -> list[int]:
    return [int(index) for index in text.split(",")]
