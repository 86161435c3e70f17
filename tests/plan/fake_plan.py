"""A plan that nothing compiled."""

import dataclasses

from llmjax.plan import plan as plans
from llmjax.plan.compile_ahead import Memory, Program
from llmjax.plan.costs import Costs
from llmjax.plan.predict import StepTime
from llmjax.plan.topology import Topology
from llmjax.run.config import RunConfig


def make_plan(config: RunConfig, topology: Topology, *, seconds: float, gib: float) -> plans.Plan:
    """A plan whose step takes `seconds`, all of them in matmuls, and whose temporaries take `gib`."""
    program = Program(
        optimized="",
        scheduled="",
        out_of_memory=False,
        memory=Memory(arguments=0, temporaries=int(gib * 2**30)),
        largest=[],
        mesh=dataclasses.asdict(config.mesh),
        slice_of=[0] * topology.num_chips,
        parameters=10**9,
        parameter_bytes=1,
        optimizer_bytes=1,
        seconds=0.0,
    )
    parts = dict.fromkeys((field.name for field in dataclasses.fields(StepTime)), 0.0) | {"matmul": seconds}
    plan = plans.Plan(
        config=config,
        topology=topology,
        program=program,
        costs=Costs(),
        step_tokens=1_000_000,
        model_flops=1e12,
        time=StepTime(**parts),
        quick=True,
    )
    return plan if plan.fits else dataclasses.replace(plan, time=None)
