"""Predict the time of a step on a TPU from its compiled program.

Quick depth: matmuls at the usual share of the chip's peak, those of int8 by their speedup, everything else by its HBM
traffic. Full depth: the cycles
that the compiler wrote beside each instruction of the scheduled program. Both price attention kernels from the blocks
that they execute, grouped matmuls at a share of the peak, and collectives by the wire bytes of a ring.

Not modelled: collectives that the SparseCore runs, stragglers, input, latency of the network between slices.
"""

from collections.abc import Sequence
import dataclasses
import math

from llmjax.plan import matmuls, traffic
from llmjax.plan.costs import Costs, KernelWork
from llmjax.plan.hlo import Instruction, Module
from llmjax.plan.topology import Chip

_LINK_SHARE, _HBM_SHARE = 0.9, 0.9  # of the specified rates
_GROUPED_SHARE = 0.73  # of the peak; from one published run, so weak
# The compiler prices a copy at 40% of the specified HBM rate; the factor brings it to about 90%.
_ELEMENTWISE_FACTOR = 0.45
_STEP_CYCLES, _ROW_CYCLES = 210, 0.7  # of an attention kernel, for each grid step and each row of a block of queries
_HOST_RATE = 32e9  # bytes a second each way; assumed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Predicted over measured seconds of a step, of runs that others published; the table is in docs/plan.md.

    runs   how many; median, lowest and highest are of their ratios
    """

    runs: int
    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        span = f"{self.lowest:.2f} to {self.highest:.2f}, median {self.median:.2f}"
        return f"predicted over measured seconds were {span}, for {self.runs} published runs of another codebase"


# What tools/calibrate_plan.py prints for the quick depth, and with --full for six of its runs.
QUICK_CALIBRATION = Calibration(runs=16, median=0.94, lowest=0.86, highest=1.17)
FULL_CALIBRATION = Calibration(runs=6, median=0.96, lowest=0.85, highest=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by part.

    matmul, elementwise, attention, grouped   of the device's compute; attention without a kernel is in the first two
    exposed   collectives that no compute hides
    hidden    collectives that run beside compute
    host      copies to and from the host that last longer than the compute
    """

    matmul: float
    elementwise: float
    attention: float
    grouped: float
    exposed: float
    hidden: float
    host: float

    @property
    def compute(self) -> float:
        """Seconds in which the device computes."""
        return self.matmul + self.elementwise + self.attention + self.grouped

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed + self.host

    @property
    def parts(self) -> dict[str, float]:
        """The seconds that add up to `total`, by the names that people read."""
        return {
            "matmuls": self.matmul,
            "elementwise": self.elementwise,
            "attention kernels": self.attention,
            "grouped matmuls": self.grouped,
            "exposed collectives": self.exposed,
            "host copies": self.host,
        }


def estimate(costs: Costs, chip: Chip) -> StepTime:
    """The quick depth. `chip` must have the shares and cycles of the cost model."""
    assert chip.matmul_share is not None
    flops = costs.matmul_flops - costs.int8_flops + costs.int8_flops / chip.int8_speedup
    matmul = flops / (chip.matmul_share * chip.peak)
    elementwise = chip.elementwise * costs.other_hbm_bytes / (_HBM_SHARE * chip.hbm_rate)
    attention = _attention_seconds(costs.attention, chip)
    grouped = costs.grouped_flops / (_GROUPED_SHARE * chip.peak)
    compute = matmul + elementwise + attention + grouped
    asynchronous = wire_seconds(costs.asynchronous_ici_bytes, 0, chip)
    hidden = min(asynchronous, compute)
    return StepTime(
        matmul=matmul,
        elementwise=elementwise,
        attention=attention,
        grouped=grouped,
        exposed=wire_seconds(costs.ici_bytes, costs.dcn_bytes, chip) - hidden,
        hidden=hidden,
        host=max(0.0, costs.host_bytes / 2 / _HOST_RATE - compute),
    )


def wire_seconds(ici_bytes: float, dcn_bytes: float, chip: Chip) -> float:
    """Seconds in which a chip sends wire bytes: over both links of every axis, and to the other slices."""
    return ici_bytes / (2 * chip.axes * chip.link_rate * _LINK_SHARE) + dcn_bytes / chip.dcn_rate


def _attention_seconds(kernels: dict[str, KernelWork], chip: Chip) -> float:
    return sum(_kernel_seconds(name, work, chip) for name, work in kernels.items())


def _kernel_seconds(name: str, work: KernelWork, chip: Chip) -> float:
    if not work.elements or chip.attention_cycles is None or chip.clock is None:
        return work.flops / (0.5 * chip.peak)
    backward = matmuls.is_backward(name)
    per_element = chip.attention_cycles[backward]
    if "segmented" in name:
        per_element += chip.segment_cycles[backward]
    cycles = work.elements * per_element + work.grid_steps * _STEP_CYCLES + work.rows * _ROW_CYCLES
    return cycles / chip.clock / chip.attention_cores


class _Walk:
    """One pass over a scheduled program: seconds of each computation by part, loops multiplied."""

    def __init__(self, module: Module, slice_of: Sequence[int], chip: Chip):
        self.module, self.slice_of, self.chip = module, slice_of, chip
        assert chip.clock is not None
        self.clock = chip.clock
        self.done: dict[str, StepTime] = {}

    def computation(self, name: str) -> StepTime:
        if name not in self.done:
            self.done[name] = self._add_up(name)
        return self.done[name]

    def _add_up(self, name: str) -> StepTime:
        total = dict.fromkeys((field.name for field in dataclasses.fields(StepTime)), 0.0)
        now, started = 0.0, {}
        for instruction in self.module.computations[name]:
            if instruction.opcode in ("while", "call", "conditional"):
                for callee, times in self.module.calls(instruction):
                    inner = self.computation(callee)
                    for part in total:
                        total[part] += times * getattr(inner, part)
                    now += times * (inner.compute + inner.exposed)
                continue
            wire = self._wire(instruction)
            role, channel = traffic.async_fusion(instruction, self.module)
            if wire and (role == "start" or instruction.opcode.endswith("-start")):
                started[channel or instruction.name] = (now, wire)
                continue
            ended = channel if role == "done" else instruction.operands[0] if instruction.operands else ""
            if (role == "done" or instruction.opcode.endswith("-done")) and ended in started:
                begin, wire = started.pop(ended)
                exposed = max(0.0, wire - (now - begin))
                total["exposed"] += exposed
                total["hidden"] += wire - exposed
                now += exposed
                continue
            part, seconds = self._compute(instruction)
            total[part] += seconds
            exposed = max(0.0, wire - seconds)  # a collective inside a matmul's fusion takes the longer of both
            total["exposed"] += exposed
            total["hidden"] += wire - exposed
            now += seconds + exposed
        return StepTime(**total)

    def _compute(self, instruction: Instruction) -> tuple[str, float]:
        if name := matmuls.kernel_name(instruction):
            if matmuls.is_grouped_matmul(name):
                flops = matmuls.grouped_matmul_flops(self.module, instruction)
                return "grouped", flops / (_GROUPED_SHARE * self.chip.peak)
            if matmuls.is_attention(name) and (work := matmuls.attention_work(self.module, instruction)):
                return "attention", _kernel_seconds(name, work, self.chip)
        if instruction.opcode in ("async-start", "async-update", "async-done", "copy-start", "copy-done"):
            return "elementwise", 0.0  # copies to fast memory and SparseCore calls beside the compute
        cycles = float(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        if matmuls.has_matmul(self.module, instruction):
            return "matmul", cycles / self.clock
        return "elementwise", cycles * _ELEMENTWISE_FACTOR / self.clock

    def _wire(self, instruction: Instruction) -> float:
        """Seconds on the wire of the collective that an instruction is, starts or has inside."""
        inner = [instruction]
        if instruction.opcode in ("fusion", "async-start"):
            inner += [
                i for names in instruction.callees.values() for name in names for i in self.module.computations[name]
            ]
        found = (traffic.collective(i, self.module, self.slice_of) for i in inner)
        return math.fsum(wire_seconds(c.ici_bytes, c.dcn_bytes, self.chip) for c in found if c)


def read_schedule(module: Module, costs: Costs, slice_of: Sequence[int], chip: Chip) -> StepTime:
    """The full depth: the compiler's cycles of a scheduled program."""
    step = _Walk(module, slice_of, chip).computation(module.entry)
    return dataclasses.replace(step, host=max(0.0, costs.host_bytes / 2 / _HOST_RATE - step.compute))
