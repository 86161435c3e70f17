"""Logical axes, and the rules that map them to mesh axes.

The names appear in docstrings as shapes, on parameters as shardings, on activations as constraints: batch seq embed mlp
blocks heads kv_heads head_dim vocab layers, entries (of a table that is looked up by position or distance), experts (of
a mixture), router (a router's logits), latent (from which keys and values are computed), rank (of an adapter), outputs
(of a head for labels). The rules (logical axis -> mesh axes) are data in the config.
"""

from collections.abc import Iterator, Sequence
import contextlib
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from llmjax.errors import UserError, suggest

LogicalRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: LogicalRules = (
    ("batch", ("slice", "data", "fsdp", "expert")),
    ("seq", "sequence"),
    ("embed", ("fsdp", "sequence", "expert")),
    ("mlp", "tensor"),
    ("blocks", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("vocab", "tensor"),
    ("entries", None),
    ("layers", None),
    ("experts", "expert"),
    ("router", None),
    ("latent", None),
    ("rank", None),
    ("outputs", None),
)

# From the slowest network to the fastest one: a neighbour along the last axis is a neighbour in the hardware.
MESH_AXES = ("slice", "data", "fsdp", "expert", "sequence", "tensor")

# A user context is part of jit's cache key, so that other rules compile another program.
_rules = jax.make_user_context(DEFAULT_RULES)
_gradient_dtype = jax.make_user_context("")


def complete_rules(rules: LogicalRules) -> LogicalRules:
    """`rules`, with the default for every logical axis that they do not name.

    The config of an old run has no rule for an axis that was added later, and must stay loadable. Defaults are safe,
    since rules decide which device holds a number and never its value. `spec` raises where a default and a rule would
    shard two dimensions of an array by one mesh axis. Raises UserError for a malformed rule and for an unknown axis.
    """
    completed = dict(DEFAULT_RULES)
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise UserError(f"parallel.rules: {rule!r} is not a pair (logical axis, mesh axes)")
        logical, mesh_axes = rule
        if logical not in completed:
            raise UserError(f"parallel.rules: there is no logical axis {logical!r}{suggest(logical, completed)}")
        for name in _as_tuple(mesh_axes):
            if name not in MESH_AXES:
                near = suggest(str(name), MESH_AXES)
                raise UserError(f"parallel.rules: {logical!r} -> {name!r}: there is no such mesh axis{near}")
    return tuple((completed | dict(rules)).items())


def _as_tuple(mesh_axes: Any) -> tuple:
    """The right side of a rule as a tuple of mesh axes."""
    if mesh_axes is None:
        return ()
    return mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES, gradient_dtype: str = "") -> Iterator[None]:
    """Inside, arrays are laid out on `mesh` by `rules`. A command enters this once, around all its work.

    gradient_dtype   what the function of this name returns; "": its argument
    """
    with jax.set_mesh(mesh), _rules(tuple(rules)), _gradient_dtype(gradient_dtype):
        yield


def gradient_dtype(default: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The type in which a parameter's gradient is computed and added over devices: that of `use_mesh`, or `default`."""
    return _gradient_dtype.value or default


def device() -> Any:
    """The kind of device that programs run on: an object with `platform` ("cpu", "gpu" or "tpu") and `device_kind`.

    That of the mesh, whose devices need not be present; without a mesh, this process's.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def spec(
    logical: Sequence[str | None],
    shape: Sequence[int] | None = None,
    mesh: Mesh | jax.sharding.AbstractMesh | None = None,
) -> P:
    """Mesh axes for logical axes, by the rules of `use_mesh` and by default on its mesh.

    shape   where the mesh axes of a dimension do not divide its size, it stays unsharded

    Axes that are already manual (inside pmap or shard_map) are left out. A rule of several mesh axes leaves out those
    that an earlier dimension of the array uses, such as "expert" in the weights of experts; a rule of one axis must not
    meet that case. Raises KeyError for an unknown logical axis.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    entries, used = [], []
    for i, name in enumerate(logical):
        mesh_axes = () if name is None else mesh_axes_of(name, mesh)
        if len(mesh_axes) > 1:
            mesh_axes = tuple(axis for axis in mesh_axes if axis not in used)
        if shape is not None and shape[i] % math.prod(mesh.shape[axis] for axis in mesh_axes):
            mesh_axes = ()
        if reused := [axis for axis in mesh_axes if axis in used]:
            raise UserError(
                f"parallel.rules: {reused[0]!r} would shard two dimensions of ({', '.join(map(str, logical))}); change "
                "the rule of one of them"
            )
        used += mesh_axes
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return P(*entries)


def sharded_by(spec: P) -> tuple[str, ...]:
    """The mesh axes of a spec on the mesh of `use_mesh`; () where they have one device each."""
    mesh_axes = tuple(axis for entry in spec for axis in _as_tuple(entry))
    shape = jax.sharding.get_abstract_mesh().shape
    return mesh_axes if any(shape[axis] > 1 for axis in mesh_axes) else ()


def shard_shape(shape: Sequence[int], spec: P) -> tuple[int, ...]:
    """The shape of one device's part of an array that `spec` shards on the mesh of `use_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    divisor = lambda entry: math.prod(mesh.shape[axis] for axis in _as_tuple(entry))
    return tuple(size // divisor(entry) for size, entry in zip(shape, spec, strict=True))


@contextlib.contextmanager
def manual(mesh_axes: Sequence[str]) -> Iterator[None]:
    """Inside, functions are traced as in a shard_map over `mesh_axes`; does nothing without axes."""
    if not mesh_axes:
        yield
        return
    mesh = jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh_axes, AxisType.Manual))):
        yield


def used_axes(spec: P) -> set[str]:
    """The mesh axes that a spec names, those of one device included."""
    return {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}


def mesh_axes_of(logical: str, mesh: Mesh | jax.sharding.AbstractMesh | None = None) -> tuple[str, ...]:
    """The axes of the mesh (None: that of `use_mesh`) that shard a logical axis, without those that are manual."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    manual = getattr(mesh, "manual_axes", ())
    rule = _as_tuple(dict(_rules.value)[logical])
    return tuple(axis for axis in rule if axis in mesh.axis_names and axis not in manual)


def num_shards(logical: str) -> int:
    """The number of parts into which the mesh of `use_mesh` cuts a logical axis."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in mesh_axes_of(logical))


def check_rules() -> None:
    """Raise UserError where no rule uses an axis of the mesh, so that its devices would all do the same work."""
    used = {axis for _, rule in _rules.value for axis in _as_tuple(rule)}
    for axis, size in jax.sharding.get_mesh().shape.items():
        if size > 1 and axis not in used:
            raise UserError(
                f"mesh.{axis}={size}: no rule of parallel.rules uses this axis; set parallel.rules=() for the default "
                "rules, or set it to 1"
            )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrain an activation's sharding by logical axes; does nothing without a mesh or inside pmap."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) == set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical, x.shape))


def shardings(axes: Any, shapes: Any) -> Any:
    """NamedShardings of a tree on the mesh of `use_mesh`; `axes`: a tuple of logical axes for each leaf of `shapes`."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape)), shapes, axes)
