"""Topologies by name."""

import importlib.util
import os
import subprocess
import sys
import types

import jax
import numpy as np
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


def fake_devices(name: str, slices: int = 1) -> list[types.SimpleNamespace]:
    """What `of_devices` reads of the devices of a topology."""
    parsed = topology.parse(name, slices)
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "v4": "TPU v4", "tpu7x": "TPU7x"}
    return [
        types.SimpleNamespace(
            platform="tpu",
            device_kind=kinds[name.partition(":")[0]],
            coords=[*index, *[0] * (3 - len(index))],
            slice_index=number if slices > 1 else None,
        )
        for number in range(slices)
        for index in np.ndindex(parsed.dims)
        for _ in range(parsed.chip_devices)
    ]


@pytest.mark.parametrize(
    ("name", "slices"), [("v5e:2x4", 1), ("v6e:4x4", 2), ("v5p:2x2x1", 1), ("v4:2x2x2", 1), ("tpu7x:2x2x1", 2)]
)
def test_the_topology_of_the_devices_of_a_job(name, slices):
    assert topology.of_devices(fake_devices(name, slices)) == topology.parse(name, slices)


def test_the_topology_of_cpu_devices():
    assert topology.of_devices(jax.devices()) == topology.parse(f"cpu:{jax.device_count()}")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (fake_devices("v5e:2x4")[:-1], "the 7 devices of v5e form no whole slices of one shape"),
        (fake_devices("v6e:4x4", 2)[:-4], "form no whole slices of one shape"),
        (fake_devices("tpu7x:2x2x1")[:-1], "7 devices are not those of 1 x tpu7x:2x2x1"),
        (fake_devices("v5e:2x4")[:2], "a host has 2x2 chips"),
    ],
)
def test_devices_that_form_no_slice_are_refused(devices, message):
    with pytest.raises(UserError, match=message):
        topology.of_devices(devices)


def test_an_unknown_kind_of_tpu_is_refused():
    devices = [types.SimpleNamespace(platform="tpu", device_kind="TPU v3", coords=[0, 0, 0])]
    with pytest.raises(UserError, match="device_kind='TPU v3': the planner knows v4, v5e"):
        topology.of_devices(devices)


def test_the_compilers_own_devices_give_the_topology_back():
    """As the runtime names chips, coordinates and slices. In a process of its own, since libtpu prints and stays."""
    pytest.importorskip("libtpu", reason="compiles for a TPU: pip install libtpu")
    code = (
        "from llmjax.plan import topology as t; "
        "names = ('v4:2x2x2', 1), ('v5e:2x4', 1), ('v5p:4x4x4', 1), ('v6e:4x4', 2), ('tpu7x:2x2x1', 2); "
        "print([t.of_devices(t.devices(t.parse(*name))) == t.parse(*name) for name in names])"
    )
    environment = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == str([True] * 5)
