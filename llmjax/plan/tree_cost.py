"""What parallel.reduction="fixed_tree" costs on a machine: its buffers, and sums that cross the torus."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from llmjax.parallel.fixed_tree import DATA, FSDP
from llmjax.plan import predict
from llmjax.plan.topology import Chip, wrap
from llmjax.run.config import RunConfig

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeCost:
    """Of one device and one step.

    micro_steps    virtual shards that a device computes one after another
    buffers        sums of gradients that it keeps, each of `buffer_bytes`
    sum_bytes      that it sends to add gradients, as many as a ring sends
    link_bytes     the same, times the links of the torus that each byte passes; a ring's bytes pass one
    hops           mesh axis -> links that a byte of its sums passes, on average; {}: no torus is known
    """

    micro_steps: int
    buffers: int
    buffer_bytes: int
    sum_bytes: float
    link_bytes: float
    hops: dict[str, float]

    def extra_seconds(self, chip: Chip) -> float:
        """Seconds that the sums take beyond those of a ring."""
        return predict.wire_seconds(self.link_bytes - self.sum_bytes, 0, chip)


def tree_cost(config: RunConfig, mesh: dict[str, int], parameters: int, hops: dict[str, float]) -> TreeCost:
    """The cost of a config's mode on a mesh (axis -> size); `hops` as in TreeCost."""
    data, fsdp = mesh.get(DATA, 1), mesh.get(FSDP, 1)
    micro_steps = config.parallel.virtual_shards // (data * fsdp)
    gradients = _FLOAT32 * parameters
    share = lambda size: (size - 1) / size  # of an array that leaves a device
    # Each micro-step adds over fsdp; once a step the parts are added over data, and gathered again.
    sums = {FSDP: micro_steps * gradients * share(fsdp), DATA: 2 * gradients / fsdp * share(data)}
    return TreeCost(
        micro_steps=micro_steps,
        buffers=int(math.log2(micro_steps)) + 2,
        buffer_bytes=gradients // fsdp,
        sum_bytes=sum(sums.values()),
        link_bytes=sum(size * max(hops.get(axis, 1.0), 1.0) for axis, size in sums.items()),
        hops=hops,
    )


def mean_hops(devices: np.ndarray, axis: int, dims: Sequence[int]) -> float:
    """Links of a torus that a byte passes, on average, where all devices along an axis of a mesh send to all others.

    devices   of the mesh, with `coords`
    dims      chips along each axis of the torus
    """
    closed = wrap(dims)
    lines = np.moveaxis(devices, axis, -1).reshape(-1, devices.shape[axis])

    def distance(a: Any, b: Any) -> int:
        steps = [abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)][: len(dims)]
        return sum(min(n, size - n) if ring else n for n, size, ring in zip(steps, dims, closed, strict=False))

    line = lines[0]  # the others are its copies elsewhere
    pairs = [distance(a, b) for a in line for b in line if a is not b]
    return sum(pairs) / len(pairs) if pairs else 0.0


def describe(cost: TreeCost, chip: Chip | None, seconds: float | None, default_seconds: float | None) -> list[str]:
    """The cost in lines of text.

    seconds, default_seconds   of a step in this mode and with the default reduction; None: not known
    """
    lines = [
        "parallel.reduction=fixed_tree",
        f"  {cost.micro_steps} micro-steps on each device; {cost.buffers} sums of gradients of "
        f"{cost.buffer_bytes / 2**30:.2f} GiB are kept, {cost.buffers * cost.buffer_bytes / 2**30:.2f} GiB together",
        f"  sums of gradients send {cost.sum_bytes / 1e9:.2f} GB, as a ring does",
    ]
    if chip is not None and cost.hops:
        ways = ", ".join(f"{hops:.1f} along {axis}" for axis, hops in cost.hops.items())
        lines.append(
            f"  each byte passes several links of the torus ({ways}; a ring: 1): +{cost.extra_seconds(chip):.3f} s"
        )
    if seconds is not None and default_seconds is not None:
        change = 100 * (seconds / default_seconds - 1)
        lines.append(
            f"  a step takes {seconds:.3f} s, with parallel.reduction=xla {default_seconds:.3f} s: {change:+.0f}%"
        )
    return lines
