"""What a compiled step executes and moves, per device: FLOPs, kernels, wire bytes, host bytes, HBM traffic."""

from collections.abc import Sequence
import dataclasses

from llmjax.plan import matmuls, traffic
from llmjax.plan.hlo import Instruction, Module
from llmjax.plan.matmuls import KernelWork


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
    int8_flops          of matmul_flops, those of int8 operands
    grouped_flops       of grouped matmul kernels
    attention           work of attention kernels by name
    kernels             executions of hand-written kernels by name
    asynchronous_ici_bytes   of ici_bytes, those of collectives that start and end at different places
    host_bytes          to and from the host's memory
    largest_host_copy   bytes of the largest of these copies
    other_hbm_bytes     HBM traffic of instructions without a matmul
    notes               what the text does not tell
    """

    matmul_flops: float = 0
    int8_flops: float = 0
    grouped_flops: float = 0
    attention: dict[str, KernelWork] = dataclasses.field(default_factory=dict)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, CollectiveCosts] = dataclasses.field(default_factory=dict)
    asynchronous_ici_bytes: float = 0
    host_bytes: float = 0
    largest_host_copy: float = 0
    other_hbm_bytes: float = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def attention_flops(self) -> float:
        """Of attention kernels, over the blocks that they execute."""
        return sum(work.flops for work in self.attention.values())

    @property
    def attention_calls(self) -> float:
        """Executions of attention kernels, forward and backward."""
        return sum(self.kernels[name] for name in self.attention)

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
        if flops := matmuls.matmul_flops(module, instruction):
            costs.matmul_flops += times * flops
            costs.int8_flops += times * flops * matmuls.has_int8_operands(module, instruction)
        if name := matmuls.kernel_name(instruction):
            _add_kernel(costs, module, instruction, name, times)
        if collective := traffic.collective(instruction, module, slice_of):
            total = costs.collectives.setdefault(collective.kind, CollectiveCosts())
            total.count += times
            total.result_bytes += times * collective.result_bytes
            total.ici_bytes += times * collective.ici_bytes
            total.dcn_bytes += times * collective.dcn_bytes
            if collective.asynchronous:
                costs.asynchronous_ici_bytes += times * collective.ici_bytes
        if instruction.computation in fused:
            continue
        if moved := traffic.host_bytes(instruction, module):
            costs.host_bytes += times * moved
            costs.largest_host_copy = max(costs.largest_host_copy, moved)
        if not matmuls.has_matmul(module, instruction):
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
        work = matmuls.attention_work(module, instruction)
        if work is None:
            costs.notes.append(f"the FLOPs of kernel {name} are unknown and count as 0")
        costs.attention[name] = costs.attention.get(name, KernelWork()) + (work or KernelWork()).times(times)
