"""The plan of a step: a config compiled for a machine, what it needs and moves, and how long it should take."""

import dataclasses
import pathlib
import tempfile
from typing import Any

from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.errors import UserError
from llmjax.plan import compile_ahead, costs as program_costs, count, predict, topology as topologies
from llmjax.plan.compile_ahead import Program
from llmjax.plan.costs import Costs
from llmjax.plan.hlo import Module
from llmjax.plan.predict import Calibration, StepTime
from llmjax.plan.topology import Topology
from llmjax.plan.tree_cost import TreeCost, tree_cost
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig
from llmjax.run.teacher import read_teacher_config, teacher_flops_per_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step compiled for a machine. Figures are those of one JAX device and one optimizer step.

    step_tokens   tokens of a step, on all devices; of the largest batch where train.batch_schedule changes it
    model_flops   causal attention counted by half, no recomputation; a teacher's forward pass is part of them
    time          None where the cost model does not know the hardware, or the step does not fit
    quick         the depth: stopped at the optimized program
    """

    config: RunConfig
    topology: Topology
    program: Program
    costs: Costs
    step_tokens: int
    model_flops: float
    time: StepTime | None
    quick: bool

    @property
    def devices(self) -> int:
        """JAX devices of the mesh."""
        return len(self.program.slice_of)

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None where it is not known how much there is."""
        chip = self.topology.chip
        if chip is None:
            return None
        return not self.program.out_of_memory and self.program.memory.total <= chip.hbm

    @property
    def tree(self) -> TreeCost | None:
        """What parallel.reduction="fixed_tree" costs; None for the default reduction."""
        if self.config.parallel.reduction == "xla":
            return None
        return tree_cost(self.config, self.program.mesh, self.program.parameters, self.program.hops)

    @property
    def step_seconds(self) -> float | None:
        """Predicted seconds of a step."""
        return None if self.time is None else self.time.total

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over the peak of the step's seconds."""
        if self.time is None or self.topology.chip is None:
            return None
        return self.model_flops / (self.topology.chip.peak * self.time.total)

    @property
    def calibration(self) -> Calibration:
        """How far predictions of this depth were off."""
        return predict.QUICK_CALIBRATION if self.quick else predict.FULL_CALIBRATION

    def to_json(self) -> dict[str, Any]:
        """What `llmjax plan --json` prints."""
        costs, memory = self.costs, self.program.memory
        return {
            "fits": self.fits,
            "hbm_bytes": memory.total,
            "model_flops": self.model_flops,
            "executed_flops": costs.executed_flops,
            "int8_flops": costs.int8_flops,
            "attention_calls": round(costs.attention_calls),
            "ici_bytes": costs.ici_bytes,
            "dcn_bytes": costs.dcn_bytes,
            "host_bytes": costs.host_bytes,
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "hbm_limit": None if self.topology.chip is None else self.topology.chip.hbm,
            "argument_bytes": memory.arguments,
            "temporary_bytes": memory.temporaries,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "compiler": topologies.compiler_version(self.topology),
            "devices": self.devices,
            "mesh": self.program.mesh,
            "step_tokens": self.step_tokens,
            "parameters": self.program.parameters,
            "kernels": {name: round(calls) for name, calls in costs.kernels.items()},
            "collectives": {name: dataclasses.asdict(total) for name, total in costs.collectives.items()},
            "seconds": None if self.time is None else dataclasses.asdict(self.time),
            "parts": None if self.time is None else self.time.parts,
            "predicted_over_measured": dataclasses.asdict(self.calibration),
            "fixed_tree": None if self.tree is None else dataclasses.asdict(self.tree),
            "quick": self.quick,
            "notes": costs.notes,
        }


def check_vocabulary(config: RunConfig, spec: str) -> None:
    """Raise UserError for a config without model.vocab_size, which a tokenizer would give: there is none here."""
    if config.model.vocab_size:
        return
    published = run_config.published_vocab_size(spec)
    if published is not None:
        hint = f"the published models of this family have {published}"
    else:
        is_bytes = config.data.tokenizer.kind == "bytes"
        published = Bytes().vocab_size if is_bytes else config.data.tokenizer.vocab_size
        hint = f"the tokenizer {'bytes' if is_bytes else 'that this config trains'} has {published}"
    raise UserError(
        f"model.vocab_size=0: it would come from the tokenizer, and a plan has none; {hint}: "
        f"set --config.model.vocab_size={published}"
    )


def make_plan(config: RunConfig, topology: Topology, *, quick: bool) -> Plan:
    """Compile the config's step for a machine and read the program.

    Raises UserError where the config does not suit the machine. A step that does not fit its memory is a result.
    """
    with tempfile.TemporaryDirectory(prefix="llmjax-plan-") as folder:
        program = compile_ahead.compile_ahead(config, topology, pathlib.Path(folder), quick=quick)
    module = Module(program.optimized)
    costs = program_costs.count(module, program.slice_of)
    target_len = count.target_len(config)
    step_tokens = config.train.batch_sizes.largest * target_len
    flops_per_token = run_config.flops_per_token(config, target_len)
    flops_per_token += teacher_flops_per_token(config, read_teacher_config(config), target_len)
    plan = Plan(
        config=config,
        topology=topology,
        program=program,
        costs=costs,
        step_tokens=step_tokens,
        model_flops=flops_per_token * step_tokens / len(program.slice_of),
        time=None,
        quick=quick,
    )
    chip = topology.chip
    if chip is None or chip.matmul_share is None or not plan.fits:
        return plan
    if quick:
        time = predict.estimate(costs, chip)
    else:
        time = predict.read_schedule(Module(program.scheduled), costs, program.slice_of, chip)
    if plan.tree is not None:
        time = dataclasses.replace(time, exposed=time.exposed + plan.tree.extra_seconds(chip))
    return dataclasses.replace(plan, time=time)
