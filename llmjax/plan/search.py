"""Search for the fastest layout of a config on a machine: mesh shape, remat policy, microbatches."""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import tempfile
import time
from typing import Any

from llmjax.errors import UserError
from llmjax.nn.stack import REMAT
from llmjax.plan import plan as plans
from llmjax.plan.plan import Plan
from llmjax.plan.topology import Topology
from llmjax.run import state as states
from llmjax.run.config import RunConfig

logger = logging.getLogger(__name__)

_STATE_SHARE = 0.9  # of a device's memory, at most, for parameters, gradients and optimizer
_MESHES, _FULL = 2, 3  # meshes whose policies are searched; candidates that the full depth compiles
_BATCH_AXES = ("slice", "data", "fsdp", "expert")  # mesh axes that split the batch

Overrides = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that was tried: the fields that differ from the config, and its plan."""

    overrides: Overrides
    plan: Plan

    @property
    def seconds(self) -> float:
        """Of a step; infinite where it does not fit."""
        return self.plan.step_seconds or float("inf")

    @property
    def rank(self) -> tuple[float, int]:
        """Order of preference: what fits by time, the rest by memory."""
        return self.seconds, self.plan.program.memory.total

    def as_flags(self) -> str:
        """The overrides as flags of any command; axes of one device only where the family's configs may set them."""
        optional = ("mesh.slice", "mesh.expert", "train.accumulation")
        shown = [(field, value) for field, value in self.overrides if value != 1 or field not in optional]
        return " ".join(f"--config.{field}={value}" for field, value in shown)


def search(config: RunConfig, topology: Topology, *, quick: bool, seconds: float) -> list[Candidate]:
    """Try layouts until none is left or the time is over; best first.

    First every mesh with the config's remat policy ("attention" for "auto"), then policies and numbers of microbatches
    on the best meshes. The quick depth prunes; without `quick`, the full one ranks the best. Raises UserError if
    nothing could be compiled.
    """
    if topology.chip is None or topology.chip.matmul_share is None:
        raise UserError(f"--search: there is no cost model of {topology.name}; choose v5e, v5p or v6e")
    deadline = time.monotonic() + seconds
    remat = (("model.remat", "attention"),) if config.model.remat == "auto" else ()
    shapes = [(*mesh, ("train.accumulation", 1), *remat) for mesh in meshes(config, topology)]
    tried = _try_all(config, topology, [[shape] for shape in shapes], deadline)
    best = sorted(tried.values(), key=lambda candidate: candidate.rank)[:_MESHES]
    # A policy that does not fit is tried with more microbatches; one that fits only gets slower by them.
    series = [
        [
            (*_only(candidate.overrides, "mesh."), ("train.accumulation", accumulation), ("model.remat", policy))
            for accumulation in _accumulations(config, candidate.plan)
        ]
        for candidate in best
        for policy in REMAT
    ]
    tried |= _try_all(config, topology, series, deadline)
    if not tried:
        raise UserError("--search: no layout could be compiled; run without --search to see why")
    ranked = sorted(tried.values(), key=lambda candidate: candidate.rank)
    if quick:
        return ranked
    full = [_try(config, topology, candidate.overrides, quick=False) for candidate in ranked[:_FULL]]
    return sorted((candidate for candidate in full if candidate), key=lambda candidate: candidate.rank)


def meshes(config: RunConfig, topology: Topology) -> Iterator[Overrides]:
    """Mesh shapes whose state fits: data x fsdp x tensor, and expert for a mixture, in powers of two."""
    devices = topology.num_chips // topology.slices
    assert topology.chip is not None
    state = states.state_bytes(config.model, config.optimizer)
    heads = getattr(config.model, "num_heads", 1)
    experts = getattr(config.model, "num_experts", 1)
    for tensor in (1, 2, 4, 8):
        for expert in {1, min(experts, 8)}:
            if devices % (tensor * expert) or heads % tensor:
                continue
            fsdp = devices // (tensor * expert)
            while fsdp >= 1:
                data = devices // (tensor * expert * fsdp)
                if state / (fsdp * tensor * expert) > _STATE_SHARE * topology.chip.hbm:
                    break
                if config.train.global_batch % (data * fsdp * expert * topology.slices) == 0:
                    yield _mesh(slice=topology.slices, data=data, fsdp=fsdp, expert=expert, tensor=tensor)
                # Between sharding over all devices and over none, every fourth power is enough to see the trend.
                fsdp = fsdp // 4 or (1 if fsdp > 1 else 0)


def _mesh(**sizes: int) -> Overrides:
    return tuple((f"mesh.{name}", size) for name, size in sizes.items())


def _accumulations(config: RunConfig, plan: Plan) -> list[int]:
    """Numbers of microbatches that divide the rows of a device: 1, 2, 4, ..."""
    shards = 1
    for axis in _BATCH_AXES:
        shards *= plan.program.mesh.get(axis, 1)
    rows = config.train.global_batch // shards
    return [2**i for i in range(4) if rows % 2**i == 0 and 2**i <= rows]


def _only(overrides: Overrides, prefix: str) -> Overrides:
    return tuple(item for item in overrides if item[0].startswith(prefix))


def _try_all(
    config: RunConfig, topology: Topology, series: list[list[Overrides]], deadline: float
) -> dict[Overrides, Candidate]:
    """Compile the layouts of each series in the quick depth until one of them fits, some series at a time."""

    def attempt(layouts: list[Overrides]) -> list[Candidate]:
        tried: list[Candidate] = []
        for overrides in layouts:
            if time.monotonic() > deadline or any(candidate.plan.fits for candidate in tried):
                break
            if candidate := _try(config, topology, overrides, quick=True):
                tried.append(candidate)
        return tried

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        results = list(pool.map(attempt, series))
    if time.monotonic() > deadline:
        logger.info("the time of the search is over: %d of %d layouts begun", sum(map(bool, results)), len(series))
    return {candidate.overrides: candidate for tried in results for candidate in tried}


def _try(config: RunConfig, topology: Topology, overrides: Overrides, *, quick: bool) -> Candidate | None:
    """A candidate; None where the config does not suit the mesh."""
    try:
        with tempfile.TemporaryDirectory(prefix="llmjax-plan-") as folder:
            plan = plans.make_plan(apply(config, overrides), topology, pathlib.Path(folder), quick=quick)
    except UserError as error:
        logger.info("  refused: %s", error)
        return None
    candidate = Candidate(overrides=overrides, plan=plan)
    logger.info("  %8.3f s %7.2f GiB  %s", candidate.seconds, plan.program.memory.total / 2**30, candidate.as_flags())
    return candidate


def apply(config: RunConfig, overrides: Overrides) -> RunConfig:
    """The config with fields of its sections replaced."""
    for field, value in overrides:
        section, name = field.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both time and memory, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted((c for c in candidates if c.plan.fits), key=lambda c: c.rank):
        if not front or candidate.plan.program.memory.total < front[-1].plan.program.memory.total:
            front.append(candidate)
    return front


def describe(candidates: list[Candidate], spec: str) -> list[str]:
    """The Pareto front, and the winner as flags."""
    front = pareto(candidates)
    if not front:
        least = min(candidates, key=lambda c: c.plan.program.memory.total)
        return [
            f"{spec}: none of {len(candidates)} layouts fits; the smallest needs "
            f"{least.plan.program.memory.total / 2**30:.2f} GiB: {least.as_flags()}"
        ]
    lines = [f"{spec}: {len(candidates)} layouts tried; seconds of a step against memory, the best of each:"]
    for candidate in front:
        memory = candidate.plan.program.memory.total / 2**30
        figures = f"{candidate.seconds:8.3f} s {memory:7.2f} GiB  MFU {candidate.plan.mfu:.1%}"
        lines.append(f"  {figures}  {candidate.as_flags()}")
    return [*lines, "", "fastest, to paste into any command:", f"  {front[0].as_flags()}"]
