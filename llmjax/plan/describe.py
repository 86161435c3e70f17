"""The output of `llmjax plan`: what a step needs, executes and moves, its predicted time, and the cost of a run."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from llmjax.plan import topology as topologies
from llmjax.plan.budget import Budget
from llmjax.plan.plan import Plan
from llmjax.plan.units import duration, short

# Watts of a chip with its share of the host, PUE 1.1 included, low and high: assumed. Google publishes a mean of 170 to
# 192 W for a v4 chip alone (Jouppi et al., 2023, arXiv 2304.01433) and none for the others.
_WATTS = {"v4": (190, 300), "v5e": (120, 250), "v5p": (300, 550), "v6e": (200, 450), "tpu7x": (600, 1100)}
_KG_PER_KWH = (0.05, 0.5)  # CO2 of electricity: nearly carbon-free, and the mean of the world's grids


def describe(plan: Plan, spec: str) -> list[str]:
    """The plan in lines of text."""
    return [
        *_describe_head(plan, spec),
        "",
        *_describe_memory(plan),
        "",
        *_describe_work(plan),
        "",
        *_describe_time(plan),
        *([""] if plan.costs.notes else []),
        *(f"note: {note}" for note in plan.costs.notes),
    ]


def _describe_head(plan: Plan, spec: str) -> list[str]:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.program.mesh.items() if size > 1) or "1 device"
    train, depth = plan.config.train, "quick depth" if plan.quick else "full depth"
    accumulation = f" in {train.accumulation} microbatches" if train.accumulation > 1 else ""
    slices = f"{plan.topology.slices} slices of " if plan.topology.slices > 1 else ""
    rows = train.batch_sizes.largest
    return [
        f"{spec} on {slices}{plan.topology.name}: {plan.devices:,} devices, mesh {mesh}; {rows:,} rows"
        f"{accumulation}, {plan.step_tokens:,} tokens a step",
        f"{short(plan.program.parameters)} parameters, model.remat={plan.config.model.remat}; "
        f"{topologies.compiler_version(plan.topology)}, {depth}, {plan.program.seconds:.0f} s",
        "all figures are of one device",
        *([f"of the largest batch: train.batch_schedule has {train.batch_sizes} rows"] if train.batch_schedule else []),
    ]


def _describe_memory(plan: Plan) -> list[str]:
    memory, chip = plan.program.memory, plan.topology.chip
    state = {"parameters": plan.program.parameter_bytes, "optimizer state": plan.program.optimizer_bytes}
    if plan.program.teacher_bytes:
        state["the teacher's parameters"] = plan.program.teacher_bytes
    rows = {
        **state,
        "batch and padding": max(0, memory.arguments - sum(state.values())),
        "activations, gradients and workspace": memory.temporaries,
    }
    lines = ["memory, GiB", *(_row(name, size / 2**30, 2) for name, size in rows.items())]
    lines.append(_row("total", memory.total / 2**30, 2))
    if chip is None:
        lines.append("  how much memory there is: unknown")
    else:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines[-1] += f"   of {chip.hbm / 2**30:.2f}: {verdict}"
    if memory.host:
        lines.append(_row("in the host's memory", memory.host / 2**30, 2))
    for size, shapes in plan.program.largest[:4]:
        lines.append(f"  {size / 2**30:8.2f} of it {_shorten(shapes)}")
    return lines + ([] if plan.fits is not False else ["", *advise(plan)])


def advise(plan: Plan) -> list[str]:
    """What to change where a step does not fit, as overrides."""
    config, memory, chip = plan.config, plan.program.memory, plan.topology.chip
    assert chip is not None
    state = plan.program.parameter_bytes + plan.program.optimizer_bytes + plan.program.teacher_bytes
    lines = [f"{(memory.total - chip.hbm) / 2**30:.1f} GiB too much. In the order to try:"]
    shards = plan.program.mesh.get("data", 1) * plan.program.mesh.get("fsdp", 1)
    rows = config.train.batch_sizes.largest // (shards * config.train.accumulation)
    if state > 0.5 * chip.hbm and plan.program.mesh.get("data", 1) > 1:
        lines.append("  --config.mesh.data=1 --config.mesh.fsdp=-1   shards the state over all devices")
    if config.model.remat not in ("full", "attention"):
        lines.append("  --config.model.remat=attention   keeps only each layer's input and attention output")
    elif config.model.remat == "attention":
        lines.append("  --config.model.remat=full   keeps only each layer's input")
    if rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0 and (n >= memory.total / chip.hbm or n == rows))
        accumulation = config.train.accumulation * factor
        lines.append(
            f"  --config.train.accumulation={accumulation}   {rows // factor} rows of a device at a time, of {rows}"
        )
    lines.append("  more devices, or a smaller train.global_batch or data.seq_len")
    return lines


def _describe_work(plan: Plan) -> list[str]:
    costs = plan.costs
    lines = ["a step executes and sends"]
    lines.append(f"  {costs.executed_flops:.3e} FLOPs, {costs.executed_flops / plan.model_flops:.2f} x the model's")
    if costs.int8_flops:
        lines.append(f"  {costs.int8_flops:.3e} of them in matmuls of int8")
    if costs.grouped_flops:
        lines.append(f"  {costs.grouped_flops:.3e} of them in grouped matmuls")
    for name, calls in costs.kernels.items():
        lines.append(f"  {calls:5.0f} calls of kernel {name}")
    for kind, total in costs.collectives.items():
        ways = f"{total.ici_bytes / 1e9:.2f} GB on ICI"
        if total.dcn_bytes:
            ways += f", {total.dcn_bytes / 1e9:.3f} GB between slices"
        lines.append(f"  {total.count:5.0f} {kind}: {ways}" if plan.topology.chip else f"  {total.count:5.0f} {kind}")
    if costs.host_bytes:
        lines.append(
            f"  {costs.host_bytes / 1e9:.2f} GB to and from the host, {costs.largest_host_copy / 1e9:.2f} GB at once"
        )
    return lines


def _describe_time(plan: Plan) -> list[str]:
    if plan.time is None or plan.mfu is None:
        if plan.fits is False:
            return ["no time is predicted for a step that does not fit"]
        return [f"the time of a step: unknown, there is no cost model of {plan.topology.name}"]
    time = plan.time
    lines = ["predicted seconds", *(_row(name, seconds, 3) for name, seconds in time.parts.items())]
    rate = plan.step_tokens / time.total
    lines.append(_row("step", time.total, 3) + f"   {rate / plan.devices:,.0f} tokens/s a device, MFU {plan.mfu:.1%}")
    if time.hidden:
        lines.append(_row("collectives beside compute", time.hidden, 3))
    return [*lines, f"error: {plan.calibration}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCost:
    """The cost of training on a number of tokens; ranges are (low, high).

    price   per chip and hour, in any currency; None: not given
    """

    steps: float
    days: float
    chip_hours: float
    price: float | None
    kwh: tuple[float, float]
    kg_co2: tuple[float, float]

    @property
    def money(self) -> float | None:
        """Price of all chip-hours."""
        return None if self.price is None else self.price * self.chip_hours

    def to_json(self) -> dict[str, Any]:
        """The cost as JSON."""
        return {**dataclasses.asdict(self), "money": self.money}


def cost_of_run(plan: Plan, tokens: float, price: float | None) -> RunCost | None:
    """What `tokens` cost; None where the time of a step is unknown."""
    if plan.time is None:
        return None
    steps = tokens / plan.step_tokens
    hours = steps * plan.time.total / 3600
    chip_hours = hours * plan.topology.num_chips
    low, high = (chip_hours * watts / 1000 for watts in _WATTS[plan.topology.name.partition(":")[0]])
    return RunCost(
        steps=steps,
        days=hours / 24,
        chip_hours=chip_hours,
        price=price,
        kwh=(low, high),
        kg_co2=(low * _KG_PER_KWH[0], high * _KG_PER_KWH[1]),
    )


def add_costs(costs: Sequence[RunCost | None]) -> RunCost | None:
    """The cost of all phases of a run; None where one is unknown."""
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    total = lambda read: sum(map(read, known))
    both = lambda read: (total(lambda cost: read(cost)[0]), total(lambda cost: read(cost)[1]))
    return RunCost(
        steps=total(lambda cost: cost.steps),
        days=total(lambda cost: cost.days),
        chip_hours=total(lambda cost: cost.chip_hours),
        price=known[0].price,
        kwh=both(lambda cost: cost.kwh),
        kg_co2=both(lambda cost: cost.kg_co2),
    )


def describe_run(plan: Plan, tokens: float, cost: RunCost | None) -> list[str]:
    """The cost of a run in lines of text."""
    if cost is None:
        return ["", f"{short(tokens)} tokens: no cost, since the time of a step is unknown"]
    budget = Budget(plan.program.parameters, tokens)
    lines = [
        "",
        f"{short(tokens)} tokens: {cost.steps:,.0f} steps, {duration(cost.days * 86400)}, {short(cost.chip_hours)} "
        f"chip-hours; {tokens / plan.program.parameters:.0f} tokens a parameter, expected loss {budget.loss:.3f} nats",
    ]
    if cost.money is None:
        lines.append("  money: give --price, of a chip and hour")
    else:
        lines.append(f"  money: {cost.money:,.0f} at {cost.price:g} a chip and hour")
    low, high = _WATTS[plan.topology.name.partition(":")[0]]
    lines.append(
        f"  energy: {short(cost.kwh[0])} to {short(cost.kwh[1])} kWh, assuming {low} to {high} W a chip with its share "
        "of hosts and cooling"
    )
    lines.append(
        f"  CO2: {short(cost.kg_co2[0] / 1000)} to {short(cost.kg_co2[1] / 1000)} t, assuming {_KG_PER_KWH[0]} to "
        f"{_KG_PER_KWH[1]} kg a kWh"
    )
    return [*lines, "  without evaluations, checkpoints, restarts and waiting for data"]


def _row(name: str, value: float, digits: int) -> str:
    return f"  {value:8.{digits}f} {name}"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
