"""What a compiled step executes and moves, per device: FLOPs, kernels, wire bytes, host bytes, HBM traffic."""

from collections.abc import Sequence
import dataclasses

from llmjax.plan import matmuls, traffic
from llmjax.plan.hlo import Instruction, Module


@dataclasses.dataclass
class CollectiveCosts:
    """All collectives of one kind: executions, bytes of their results, and wire bytes that a chip sends."""

    count: float = 0
    result_bytes: float = 0
    ici_bytes: float = 0
    dcn_bytes: float = 0


@dataclasses.dataclass
class Costs:
    """Totals of one execution of a program on one device.

    matmul_flops        of matmuls that the compiler knows, also inside fusions
    attention_flops     of attention kernels, over the blocks that they execute
    attention_elements  pairs (query, key) of these blocks by kernel, and grid_steps, executed or skipped
    grouped_flops       of grouped matmul kernels
    attention_calls     executions of attention kernels by name
    kernels             executions of hand-written kernels by name
    host_bytes          to and from the host's memory
    largest_host_copy   bytes of the largest of these copies
    other_hbm_bytes     HBM traffic of instructions without a matmul
    notes               what the text does not tell
    """

    matmul_flops: float = 0
    attention_flops: float = 0
    grouped_flops: float = 0
    attention_elements: dict[str, float] = dataclasses.field(default_factory=dict)
    grid_steps: dict[str, float] = dataclasses.field(default_factory=dict)
    attention_calls: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, CollectiveCosts] = dataclasses.field(default_factory=dict)
    host_bytes: float = 0
    largest_host_copy: float = 0
    other_hbm_bytes: float = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def executed_flops(self) -> float:
        """Matmuls, attention kernels and grouped matmuls."""
        return self.matmul_flops + self.attention_flops + self.grouped_flops

    @property
    def ici_bytes(self) -> float:
        """Ring wire bytes that a chip sends inside its slice."""
        return sum(costs.ici_bytes for costs in self.collectives.values())

    @property
    def dcn_bytes(self) -> float:
        """Ring wire bytes that a chip sends to other slices."""
        return sum(costs.dcn_bytes for costs in self.collectives.values())


def count(module: Module, slice_of: Sequence[int]) -> Costs:
    """Add up a program.

    slice_of   partition of the program -> the slice that its chip is in; its length is the number of devices
    """
    costs = Costs()
    fused = {name for i in module.instructions.values() if i.opcode == "fusion" for name in i.callees["calls"]}
    for instruction, times in module.executed():
        costs.matmul_flops += times * matmuls.matmul_flops(module, instruction)
        if name := matmuls.kernel_name(instruction):
            _add_kernel(costs, module, instruction, name, times)
        if instruction.computation in fused:
            continue
        if collective := traffic.collective(instruction, module, slice_of):
            total = costs.collectives.setdefault(collective.kind, CollectiveCosts())
            total.count += times
            total.result_bytes += times * collective.result_bytes
            total.ici_bytes += times * collective.ici_bytes
            total.dcn_bytes += times * collective.dcn_bytes
        if moved := traffic.host_bytes(instruction, module):
            costs.host_bytes += times * moved
            costs.largest_host_copy = max(costs.largest_host_copy, moved)
        if not _has_matmul(module, instruction):
            costs.other_hbm_bytes += times * traffic.hbm_bytes(instruction, module)
    if module.unknown_loops:
        loops = ", ".join(module.unknown_loops)
        costs.notes.append(f"loops whose number of iterations depends on data count as one iteration: {loops}")
    return costs


def _add_kernel(costs: Costs, module: Module, instruction: Instruction, name: str, times: float) -> None:
    costs.kernels[name] = costs.kernels.get(name, 0) + times
    if matmuls.is_grouped_matmul(name):
        costs.grouped_flops += times * matmuls.grouped_matmul_flops(module, instruction)
    elif matmuls.is_attention(name):
        costs.attention_calls[name] = costs.attention_calls.get(name, 0) + times
        work = matmuls.attention_work(module, instruction)
        if work is None:
            costs.notes.append(f"the FLOPs of kernel {name} are unknown and count as 0")
            return
        flops, elements, steps = work
        costs.attention_flops += times * flops
        costs.attention_elements[name] = costs.attention_elements.get(name, 0) + times * elements
        costs.grid_steps[name] = costs.grid_steps.get(name, 0) + times * steps


def _has_matmul(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
        return matmuls.matmul_flops(module, instruction) > 0
    return any(
        inner.opcode in ("dot", "convolution", "custom-call")
        and (matmuls.matmul_flops(module, inner) or matmuls.kernel_name(inner))
        for name in instruction.callees["calls"]
        for inner in module.computations[name]
    )
