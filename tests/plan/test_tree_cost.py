"""The cost of parallel.reduction="fixed_tree": buffers, bytes and links of a torus."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from llmjax.plan import plan as plans, topology as topologies, tree_cost
from llmjax.run import config as run_config

CONFIG = run_config.resolve("llama:tiny", (("model.vocab_size", "256"), ("train.global_batch", "64")))
FIXED = [("parallel.reduction", "fixed_tree"), ("parallel.virtual_shards", 64)]


def line(dims: tuple[int, ...]) -> np.ndarray:
    """The chips of a torus as one axis of a mesh."""
    chips = list(itertools.product(*map(range, dims)))
    devices = np.empty(len(chips), object)
    devices[:] = [SimpleNamespace(coords=chip) for chip in chips]
    return devices


def test_hops_of_a_line_a_ring_and_a_torus():
    """A line of 4: 10 links for 6 pairs; a ring of 16: 1 + 2 + ... + 8 + ... + 1 to 15 others; twice that in 2D."""
    assert tree_cost.mean_hops(line((4, 1)), 0, (4, 1)) == pytest.approx(10 / 6)
    assert tree_cost.mean_hops(line((16, 1)), 0, (16, 1)) == pytest.approx(64 / 15)
    assert tree_cost.mean_hops(line((16, 16)), 0, (16, 16)) == pytest.approx(2 * 64 * 16 / 255)


@pytest.mark.parametrize("dims", [(4, 4, 4), (8, 8, 8), (16, 16)], ids=str)
def test_all_to_all_loads_links_no_more_than_halving(dims):
    """Bytes on the busiest link, of sums of 1 byte a device. A message of halving uses one link of each chip at a time,
    those of an all-to-all use both links of all axes."""
    devices = line(dims)
    size, halving = len(devices), 0.0
    for bit in range(size.bit_length() - 1):
        steps = [abs(a - b) for a, b in zip(devices[0].coords, devices[1 << bit].coords, strict=True)]
        halving += 0.5 ** (bit + 1) * sum(min(step, n - step) for step, n in zip(steps, dims, strict=True))
    all_to_all = tree_cost.mean_hops(devices, 0, dims) * (size - 1) / size / (2 * len(dims))
    assert all_to_all < halving


def test_the_buffers_and_bytes_of_a_step():
    """64 virtual shards on data 2 x fsdp 4: 8 micro-steps, and 3 + 2 sums of a quarter of the gradients."""
    config = run_config.with_fields(CONFIG, FIXED)
    cost = tree_cost.tree_cost(config, {"data": 2, "fsdp": 4}, 1000, {"fsdp": 1.5, "data": 2.0})
    assert (cost.micro_steps, cost.buffers, cost.buffer_bytes) == (8, 5, 1000)
    over_fsdp, over_data = 8 * 4000 * 3 / 4, 2 * 1000 / 2
    assert cost.sum_bytes == over_fsdp + over_data and cost.link_bytes == 1.5 * over_fsdp + 2 * over_data
    text = "\n".join(tree_cost.describe(cost, topologies.CHIPS["v5p"], 1.5, 1.0))
    assert "8 micro-steps" in text and "1.5 along fsdp, 2.0 along data" in text and "1.000 s: +50%" in text


@pytest.mark.slow
def test_the_loops_of_a_step_are_counted():
    """With as many microbatches the default step executes the same matmuls; the sums send the bytes that are stated."""
    sizes = {"model.embed": 128, "model.num_heads": 4, "model.num_kv_heads": 4, "data.seq_len": 64}
    fields = {"model.vocab_size": 256, "train.global_batch": 64, "mesh.data": 1, "mesh.fsdp": 4} | sizes
    config = run_config.resolve("llama:tiny", [(name, str(value)) for name, value in fields.items()])
    default = run_config.with_fields(config, [("train.accumulation", 16)])
    cpu = topologies.parse("cpu:4")
    fixed, default = (plans.make_plan(c, cpu, quick=True) for c in (run_config.with_fields(config, FIXED), default))
    assert fixed.costs.executed_flops == pytest.approx(default.costs.executed_flops, rel=0.01)
    assert fixed.tree is not None
    assert fixed.costs.collectives["all-to-all"].ici_bytes == pytest.approx(fixed.tree.sum_bytes, rel=0.05)
