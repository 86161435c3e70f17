"""Mesh sizes for the devices, and rules from logical axes to mesh axes."""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, ParallelConfig, make_mesh, mesh_shape


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_minus_one_is_resolved_to_the_remaining_devices(config, expected):
    sizes = mesh_shape(config, 8)
    assert tuple(sizes[name] for name in ("data", "fsdp", "tensor")) == expected
    assert make_mesh(config).devices.shape == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=4), r"needs 4 devices, but there are 8: change mesh.data"),
        (MeshConfig(fsdp=3), r"3 does not divide the 8 devices"),
        (MeshConfig(data=0), r"set sizes of 1 or more"),
        (MeshConfig(data=-1, tensor=-1), r"at most one of them to -1"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(config, 8)


def test_spec_maps_logical_axes_to_mesh_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert axes.spec(("batch", "seq", "mlp"), mesh=mesh) == P(("data", "fsdp"), None, "tensor")
    # 3 heads cannot be sharded over two devices, so they stay unsharded.
    assert axes.spec(("embed", "heads", "head_dim"), (8, 3, 4), mesh) == P("fsdp", None, None)
    with pytest.raises(KeyError):
        axes.spec(("width",), mesh=mesh)


def test_new_axes_of_one_device_are_left_out():
    assert make_mesh(MeshConfig(slice=1, expert=1, sequence=1)).axis_names == ("data", "fsdp", "tensor")
    mesh = make_mesh(MeshConfig(data=1, slice=2, sequence=2, expert=2))
    assert mesh.axis_names == ("slice", "data", "fsdp", "expert", "sequence", "tensor")


def test_an_array_is_sharded_once_by_each_axis():
    mesh = make_mesh(MeshConfig(data=1, expert=2, sequence=2, fsdp=2))
    assert axes.spec(("batch", "seq", None), mesh=mesh) == P(("data", "fsdp", "expert"), "sequence", None)
    assert axes.spec(("embed", "mlp"), mesh=mesh) == P(("fsdp", "sequence", "expert"), "tensor")
    # Experts are sharded over "expert", so their widths are not.
    expected = P("expert", ("fsdp", "sequence"), "tensor")
    assert axes.spec(("experts", "embed", "mlp"), mesh=mesh) == expected


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip of a 2 x 2 slice, as mesh_utils reads it."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5e"
    core_on_chip: int = 0
    process_index: int = 0


def two_slices() -> list[Chip]:
    return [Chip(4 * s + 2 * y + x, s, (x, y, 0)) for y in (0, 1) for s in (0, 1) for x in (0, 1)]


def test_other_axes_stay_inside_a_slice():
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=-1), two_slices())
    assert mesh.shape["fsdp"] == 4
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices.reshape(2, 4))
    np.testing.assert_array_equal(slices, [[0] * 4, [1] * 4])


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(slice=4)])
def test_the_slice_axis_must_be_the_slices(config):
    with pytest.raises(UserError, match=r"mesh.slice=.: the devices are 2 TPU slices; set mesh.slice=2"):
        make_mesh(config, two_slices())


def test_other_rules_compile_another_program():
    """The rules are part of jit's cache key."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    traced = []

    @jax.jit
    def double(x):
        traced.append(axes.spec(("mlp",)))
        return axes.constrain(x, "mlp") * 2

    other = tuple(("mlp", "data") if name == "mlp" else (name, mesh_axes) for name, mesh_axes in axes.DEFAULT_RULES)
    x = jax.numpy.ones(8)
    specs = []
    for rules in (axes.DEFAULT_RULES, other, axes.DEFAULT_RULES):
        with axes.use_mesh(mesh, rules):
            specs.append(double(x).sharding.spec)
    assert traced == [P("tensor"), P("data")]
    assert specs == [P("tensor"), P("data"), P("tensor")]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("embed", "fdsp"), *axes.DEFAULT_RULES[1:]), r"'embed' -> 'fdsp': there is no such mesh axis \(did you mean"),
        ((*axes.DEFAULT_RULES, ("width", None)), r"there is no logical axis 'width'"),
        (("batch",), r"'batch' is not a pair"),
    ],
)
def test_malformed_rules_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(rules=rules)


def test_an_unknown_gradient_type_is_refused():
    with pytest.raises(UserError, match=r"parallel.gradient_dtype='float16': choose one of '', float32, bfloat16"):
        ParallelConfig(gradient_dtype="float16")


def test_a_missing_rule_keeps_its_default():
    assert ParallelConfig(rules=axes.DEFAULT_RULES[1:]) == ParallelConfig()
    rules = dict(ParallelConfig(rules=(("mlp", None),)).rules)
    assert rules == {**dict(axes.DEFAULT_RULES), "mlp": None}
