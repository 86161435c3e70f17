"""Logical axes, and the rules that map them to mesh axes.

The names appear in docstrings as shapes, on parameters as shardings, on activations as constraints: batch seq embed mlp
blocks heads kv_heads head_dim vocab layers, experts (of a mixture), router (a router's logits), latent (from which keys
and values are computed). The rules (logical axis -> mesh axes) are data in the config.
"""

from collections.abc import Iterator, Sequence
import contextlib
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from llmjax.errors import UserError, suggest

LogicalRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: LogicalRules = (
    ("batch", ("data", "fsdp")),
    ("seq", None),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("blocks", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("vocab", "tensor"),
    ("layers", None),
    ("experts", None),
    ("router", None),
    ("latent", None),
)

MESH_AXES = ("data", "fsdp", "tensor")

# A user context is part of jit's cache key, so that other rules compile another program.
_rules = jax.make_user_context(DEFAULT_RULES)


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
def use_mesh(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> Iterator[None]:
    """Inside, arrays are laid out on `mesh` by `rules`. A command enters this once, around all its work."""
    with jax.set_mesh(mesh), _rules(tuple(rules)):
        yield


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

    Axes that are already manual (inside pmap or shard_map) are left out. Raises KeyError for an unknown logical axis.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    table = dict(_rules.value)
    manual = set(getattr(mesh, "manual_axes", ()))
    entries, used = [], []
    for i, name in enumerate(logical):
        rule = _as_tuple(None if name is None else table[name])
        mesh_axes = tuple(axis for axis in rule if axis in mesh.axis_names and axis not in manual)
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
