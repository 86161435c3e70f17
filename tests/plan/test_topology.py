"""Topologies by name."""

import importlib.util

import pytest

from llmjax.errors import UserError
from llmjax.plan import topology
from llmjax.plan.devices import NAMES


@pytest.mark.parametrize(
    ("name", "dims", "wrap"),
    [
        ("v6e:16x16", (16, 16), (True, True, False)),
        ("v5e:2x4", (2, 4), (False, False, False)),
        ("v5e:8x16", (8, 16), (False, True, False)),
        ("v5p:4x4x8", (4, 4, 8), (True, True, True)),
        ("v5p:2x2x1", (2, 2, 1), (False, False, False)),
    ],
)
def test_shapes_and_rings(name, dims, wrap):
    parsed = topology.parse(name, 2)
    assert (parsed.dims, topology.wrap(dims), parsed.num_chips) == (dims, wrap, 2 * topology.parse(name).num_chips)


def test_cpu_and_gpu():
    assert topology.parse("cpu").num_chips == 1
    assert topology.parse("cpu:8").num_chips == 8
    assert topology.parse("gpu").platform == "gpu"


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v5q:2x4", 1, "did you mean 'v5p'.*choose one of v4, v5e, v5p, v6e, tpu7x, cpu, gpu"),
        ("v6e", 1, "CHIP:AxB"),
        ("v6e:0x4", 1, "CHIP:AxB"),
        ("v6e:4x4x4", 1, "v6e has 2 axes, such as v6e:16x16"),
        ("v5p:4x4", 1, "v5p has 3 axes, such as v5p:4x4x4"),
        ("v6e:3x4", 1, "a host has 2x2 chips"),
        ("cpu:8", 2, "--slices=2: cpu has no slices"),
        ("cpu:2x4", 1, "cpu:DEVICES"),
        ("gpu:8", 1, "--topology=gpu"),
    ],
)
def test_a_bad_topology_is_refused_with_what_to_write(name, slices, message):
    with pytest.raises(UserError, match=message):
        topology.parse(name, slices)


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llmjax\[plan\]'"):
        topology.check_installed(topology.parse("v6e:16x16"))
    topology.check_installed(topology.parse("cpu"))


def test_the_cost_model_knows_the_peak_of_every_chip():
    for name, chip in topology.CHIPS.items():
        assert name in NAMES and chip.peak > 1e14
