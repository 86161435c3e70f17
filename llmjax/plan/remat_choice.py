"""Choose model.remat="auto": compile the step with each policy, and take the fastest that fits in a device's memory."""

from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import os
from typing import Any

from llmjax.errors import UserError
from llmjax.parallel.memory import host_memory
from llmjax.plan import plan as plans
from llmjax.plan.plan import Plan
from llmjax.plan.topology import Topology
from llmjax.plan.units import gib
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig

# The rest of a device's memory is for the next batch, metrics and fragmentation; that of the host's memory for the
# system, the data and other programs.
DEVICE_SHARE, HOST_SHARE = 0.95, 0.75
# By executed FLOPs, ascending: a policy that keeps more computes less again (docs/models.md has the figures). `offload`
# computes no more than attention_qkv, but its copies take time that FLOPs do not show.
_ON_DEVICE = ("none", "dots_attention", "attention_qkv_mlp", "attention_mlp", "dots", "attention_qkv", "attention")
_ON_HOST = ("offload", "offload_input")
_SMALLEST = ("full",)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bytes that a step may fill in the memory of a device, and of its share of the host's; None: not known.

    basis   the share that `device` is, in words
    """

    device: float
    host: float | None
    basis: str

    def hold(self, plan: Plan) -> bool:
        """Whether a step fits."""
        memory = plan.program.memory
        on_host = self.host is None or memory.host <= self.host
        return plan.fits is not False and memory.total <= self.device and on_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class RematChoice:
    """The policy for a machine.

    plan     the step with that policy, in the quick depth
    tried    the steps with all policies that were compiled, by policy
    limits   of the memory; where no policy fits, `plan` is that of the smallest step
    """

    plan: Plan
    tried: dict[str, Plan]
    limits: Limits

    @property
    def policy(self) -> str:
        """A name of nn.stack.REMAT."""
        return self.plan.config.model.remat

    @property
    def fits(self) -> bool:
        """Whether the step fits in the limits."""
        return self.limits.hold(self.plan)

    @property
    def reason(self) -> str:
        """Why the policy was taken, in a line."""
        memory = f"{gib(self.plan.program.memory.total)} of at most {gib(self.limits.device)} ({self.limits.basis})"
        if not self.fits:
            return f"the smallest, but no policy fits: {memory}"
        if self.plan.step_seconds is None:
            return f"computes least again of those that fit: {memory}"
        count = sum(map(self.limits.hold, self.tried.values()))
        return f"the fastest of {count} that fit: {self.plan.step_seconds:.3g} s a step predicted, {memory}"

    def describe(self) -> list[str]:
        """The choice and the refused policies, in lines of text."""
        lines = [f"model.remat=auto: {self.policy}, {self.reason}"]
        for policy, plan in sorted(self.tried.items(), key=lambda item: _rank(item[1])):
            seconds = "" if plan.step_seconds is None else f"{plan.step_seconds:8.3f} s"
            verdict = "" if self.limits.hold(plan) else "   refused for memory"
            lines.append(f"  {plan.program.memory.total / 2**30:8.2f} GiB {seconds:>10}  {policy}{verdict}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """What `llmjax plan --json` prints of it."""
        tried = {
            policy: {
                "hbm_bytes": plan.program.memory.total,
                "step_seconds": plan.step_seconds,
                "fits": self.limits.hold(plan),
            }
            for policy, plan in self.tried.items()
        }
        return {"policy": self.policy, "hbm_limit": int(self.limits.device), "tried": tried}


def choose_remat(config: RunConfig, topology: Topology, *, host_devices: int | None = None) -> RematChoice:
    """The fastest policy for a machine, whatever the config's own is; nothing is run.

    host_devices   devices of this host, whose memory offloaded tensors share; None: the machine is another one, so only
                   the devices' memory is checked

    Where the cost model knows the machine, all policies are compiled, in the quick depth, and the predicted step
    decides. Otherwise the executed FLOPs do: the first that fits is taken, from the one that computes least again. CPU
    and GPU take no policy that copies to the host's memory. Raises UserError where the config does not suit the
    machine, and where the size of its memory is unknown.
    """
    policies = (*_ON_DEVICE, *(_ON_HOST if topology.platform == "tpu" else ()), *_SMALLEST)
    has_time = topology.chip is not None and topology.chip.matmul_share is not None
    tried: dict[str, Plan] = {}
    limits = None
    for policy, plan in _compile_all(config, topology, policies) if has_time else _compile(config, topology, policies):
        tried[policy] = plan
        limits = limits or _find_limits(plan, topology, host_devices)
        if not has_time and limits.hold(plan):
            break
    assert limits is not None
    fitting = [plan for plan in tried.values() if limits.hold(plan)]
    least = lambda plan: plan.program.memory.total
    best = min(fitting, key=_rank) if fitting else min(tried.values(), key=least)
    return RematChoice(plan=best, tried=tried, limits=limits)


def _rank(plan: Plan) -> tuple[float, float]:
    """Order of preference: by time, or by executed FLOPs where no time is predicted."""
    return plan.step_seconds or float("inf"), plan.costs.executed_flops


def _compile(config: RunConfig, topology: Topology, policies: Sequence[str]) -> Iterator[tuple[str, Plan]]:
    for policy in policies:
        yield policy, _make_plan(config, topology, policy)


def _compile_all(config: RunConfig, topology: Topology, policies: Sequence[str]) -> Iterator[tuple[str, Plan]]:
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        made = pool.map(lambda policy: _make_plan(config, topology, policy), policies)
        yield from zip(policies, made, strict=True)


def _make_plan(config: RunConfig, topology: Topology, policy: str) -> Plan:
    return plans.make_plan(run_config.with_fields(config, [("model.remat", policy)]), topology, quick=True)


def _find_limits(plan: Plan, topology: Topology, host_devices: int | None) -> Limits:
    share = f"{DEVICE_SHARE:.0%} of a device's memory"
    if topology.platform == "cpu":
        devices = "" if plan.devices == 1 else f" over {plan.devices} devices"
        basis = f"{HOST_SHARE:.0%} of this host's memory{devices}"
        return Limits(HOST_SHARE * host_memory() / plan.devices, None, basis)
    if topology.chip is not None:
        host = None if host_devices is None else HOST_SHARE * host_memory() / host_devices
        return Limits(DEVICE_SHARE * topology.chip.hbm, host, share)
    if plan.program.device_memory is None:
        raise UserError(f"model.remat='auto': {topology.name} does not tell how much memory it has; set it to a policy")
    return Limits(DEVICE_SHARE * plan.program.device_memory, None, share)
