"""Search for the fastest layout of a config on a machine: mesh shape, remat policy, microbatches, attention blocks."""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import itertools
import logging
import math
import os
import time
from typing import Any

from llmjax.errors import UserError
from llmjax.models.base import TransformerConfig
from llmjax.nn.stack import REMAT
from llmjax.parallel.compiler_options import vmem_limit
from llmjax.plan import plan as plans
from llmjax.plan.plan import Plan
from llmjax.plan.topology import Topology
from llmjax.run import config as run_config, state as states
from llmjax.run.config import RunConfig

logger = logging.getLogger(__name__)

_STATE_SHARE = 0.9  # of a device's memory, at most, for parameters, gradients and optimizer
# Meshes whose policies are searched, layouts whose blocks are, and layouts that the full depth compiles.
_MESHES, _BLOCKS, _FULL = 2, 2, 3
_BLOCK_SIZES = (512, 1024, 2048)
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

    First meshes with the config's remat policy ("attention" for "auto"), then policies and numbers of microbatches on
    the best meshes, then blocks of the attention kernel in the best layouts. The quick depth prunes; without `quick`,
    the full one ranks the best. Raises UserError if nothing could be compiled.
    """
    if topology.chip is None or topology.chip.matmul_share is None:
        raise UserError(f"--search: there is no cost model of {topology.name}; choose v5e, v5p or v6e")
    trials = _Trials(config, topology, time.monotonic() + seconds)
    _search_meshes(trials)
    for candidate in trials.ranked()[:_MESHES]:
        _search_policies(trials, candidate)
    for candidate in trials.ranked()[:_BLOCKS]:
        _search_blocks(trials, candidate)
    if not trials.tried:
        raise UserError("--search: no layout could be compiled; run without --search to see why")
    if quick:
        return trials.ranked()
    full = [_try(config, topology, candidate.overrides, quick=False) for candidate in trials.ranked()[:_FULL]]
    return sorted((candidate for candidate in full if candidate), key=lambda candidate: candidate.rank)


class _Trials:
    """The layouts that were tried until the deadline, a time.monotonic()."""

    def __init__(self, config: RunConfig, topology: Topology, deadline: float):
        self.config, self.topology, self.deadline = config, topology, deadline
        self.tried: dict[Overrides, Candidate] = {}

    def ranked(self) -> list[Candidate]:
        """Best first."""
        return sorted(self.tried.values(), key=lambda candidate: candidate.rank)

    def run(self, series: list[list[Overrides]]) -> list[Candidate]:
        """Compile the layouts of each series in the quick depth until one of them fits, a series a core at a time."""
        if self._is_over():
            return []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            results = list(pool.map(self._run, series))
        if self._is_over():
            logger.info("the time of the search is over: %d of %d layouts begun", sum(map(bool, results)), len(series))
        candidates = [candidate for result in results for candidate in result]
        self.tried |= {candidate.overrides: candidate for candidate in candidates}
        return candidates

    def _is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def _run(self, layouts: list[Overrides]) -> list[Candidate]:
        candidates: list[Candidate] = []
        for overrides in layouts:
            if self._is_over() or any(candidate.plan.fits for candidate in candidates):
                break
            if candidates and not _may_fit(candidates[-1], overrides, self.topology):
                continue
            candidate = self.tried.get(overrides) or _try(self.config, self.topology, overrides, quick=True)
            if candidate:
                candidates.append(candidate)
        return candidates


def _may_fit(larger: Candidate, overrides: Overrides, topology: Topology) -> bool:
    """Whether more microbatches than those of a layout that is too large could be enough: they divide its temporaries
    by at most their number."""
    assert topology.chip is not None
    factor = dict(overrides)["train.accumulation"] / dict(larger.overrides)["train.accumulation"]
    memory = larger.plan.program.memory
    return memory.arguments + memory.temporaries / factor <= topology.chip.hbm


def _search_meshes(trials: _Trials) -> None:
    """Try meshes, those that cut matmuls least first: where cutting them into more pieces is slower, no more follow."""
    remat = trials.config.model.remat
    rest = (("train.accumulation", 1), ("model.remat", "attention" if remat == "auto" else remat))
    fastest = float("inf")
    for _, group in itertools.groupby(
        meshes(trials.config, trials.topology), key=lambda mesh: dict(mesh)["mesh.tensor"]
    ):
        candidates = trials.run([[(*mesh, *rest)] for mesh in group])
        seconds = min((candidate.seconds for candidate in candidates), default=float("inf"))
        if fastest < seconds:
            break
        fastest = seconds


def _search_policies(trials: _Trials, candidate: Candidate) -> None:
    """Try remat policies on the mesh of a candidate. One that does not fit is tried with more microbatches; one that
    fits only gets slower by them."""
    mesh = tuple(item for item in candidate.overrides if item[0].startswith("mesh."))
    accumulations = _accumulations(trials.config, candidate.plan)
    trials.run(
        [
            [(*mesh, ("train.accumulation", accumulation), ("model.remat", policy)) for accumulation in accumulations]
            for policy in REMAT
        ]
    )


def _search_blocks(trials: _Trials, candidate: Candidate) -> None:
    """Try other blocks of the attention kernel in the layout of a candidate, if it fits and has one."""
    if candidate.plan.fits and candidate.plan.costs.attention and isinstance(trials.config.model, TransformerConfig):
        blocks = _blocks(trials.config.model, trials.config, trials.topology)
        trials.run([[(*candidate.overrides, ("model.attention_block", block))] for block in blocks])


def _blocks(model: TransformerConfig, config: RunConfig, topology: Topology) -> list[int]:
    """Blocks that divide the rows, and whose backward kernel fits the VMEM that the compiler may give it.

    The quick depth ends before the compiler refuses a kernel for want of VMEM. The largest part of it are two float32
    arrays of the block's scores; the next are blocks of q, k, v and their gradients.
    """
    assert topology.chip is not None
    limit = vmem_limit(config.xla, topology.chip.kind)
    width = getattr(model, "score_width", 2 * model.head_size) / 2
    return [
        block
        for block in _BLOCK_SIZES
        if config.data.seq_len % block == 0 and 8 * block**2 + 40 * block * width <= limit
    ]


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
                fits_batch = config.train.batch_sizes.largest % (data * fsdp * expert * topology.slices) == 0
                if fits_batch and _fits_torus((data, fsdp, expert, tensor), topology.dims):
                    yield _mesh(slice=topology.slices, data=data, fsdp=fsdp, expert=expert, tensor=tensor)
                # Between sharding over all devices and over none, every fourth power is enough to see the trend.
                fsdp = fsdp // 4 or (1 if fsdp > 1 else 0)


def _fits_torus(sizes: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    """Whether each axis of a mesh can be the product of dimensions of its own, as `make_mesh` requires."""
    return any(
        all(
            math.prod(dim for dim, a in zip(dims, owners, strict=True) if a == axis) == size
            for axis, size in enumerate(sizes)
        )
        for owners in itertools.product(range(len(sizes)), repeat=len(dims))
    )


def _mesh(**sizes: int) -> Overrides:
    return tuple((f"mesh.{name}", size) for name, size in sizes.items())


def _accumulations(config: RunConfig, plan: Plan) -> list[int]:
    """Numbers of microbatches that divide the rows of a device: 1, 2, 4, ..."""
    shards = 1
    for axis in _BATCH_AXES:
        shards *= plan.program.mesh.get(axis, 1)
    rows = config.train.batch_sizes.largest // shards
    return [2**i for i in range(4) if rows % 2**i == 0 and 2**i <= rows]


def _try(config: RunConfig, topology: Topology, overrides: Overrides, *, quick: bool) -> Candidate | None:
    """A candidate; None where the config does not suit the mesh."""
    try:
        plan = plans.make_plan(run_config.with_fields(config, overrides), topology, quick=quick)
    except UserError as error:
        logger.info("  refused: %s", error)
        return None
    candidate = Candidate(overrides=overrides, plan=plan)
    seconds = f"{plan.step_seconds:8.3f} s" if plan.step_seconds else "does not fit"
    logger.info("  %12s %7.2f GiB  %s", seconds, plan.program.memory.total / 2**30, candidate.as_flags())
    return candidate


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
