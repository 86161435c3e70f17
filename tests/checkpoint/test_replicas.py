"""Copies of the state that differ in one bit on one device are found, and that device is named."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from llmjax.checkpoint.replicas import check_replicas
from llmjax.errors import HardwareError
from llmjax.parallel import axes
from tests.faults import flip_a_bit

SPECS = {"replicated": P(), "rows": P("data"), "columns": P(None, "fsdp"), "both": P(("data", "fsdp"))}


@pytest.fixture(params=[(4, 2), (8, 1)], ids=str)
def mesh(request):
    mesh = jax.make_mesh((*request.param, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with axes.use_mesh(mesh):
        yield mesh


def state(mesh) -> dict:
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    return {name: jax.device_put(values, NamedSharding(mesh, spec)) for name, spec in SPECS.items()}


def test_equal_copies_pass(mesh):
    check_replicas(state(mesh))


@pytest.mark.parametrize("device", [0, 5])
def test_one_flipped_bit_names_the_device_by_the_majority(mesh, device):
    tree = state(mesh)
    tree["replicated"] = flip_a_bit(tree["replicated"], device)
    with pytest.raises(HardwareError, match=f"differ: device {device} of process 0; nothing is saved"):
        check_replicas(tree)


def test_two_copies_have_no_majority(mesh):
    tree = state(mesh)
    tree["rows"] = flip_a_bit(tree["rows"], 4)  # a row has one copy for each device along fsdp
    if mesh.shape["fsdp"] == 1:
        check_replicas(tree)
    else:
        with pytest.raises(HardwareError, match="differ: device 4 of process 0, device 5 of process 0;"):
            check_replicas(tree)


def test_an_array_without_copies_cannot_be_checked(mesh):
    check_replicas({"both": flip_a_bit(state(mesh)["both"], 3)})
