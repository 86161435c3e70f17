"""Logical axes, and the rules that map them to mesh axes.

The names stand in docstrings as shapes, on parameters as shardings, on activations as constraints:
batch seq embed mlp blocks heads kv_heads head_dim vocab layers experts (networks of a mixture, and what counts them)
router (a router's logits) latent (what keys and values are made from). The rules (logical axis -> mesh axes) are config
data.
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

# A user context is part of jit's cache key, so that changed rules never meet a stale executable.
_rules = jax.make_user_context(DEFAULT_RULES)


def complete_rules(rules: LogicalRules) -> LogicalRules:
    """The whole table: `rules`, and the default for every logical axis that they leave out.

    A run keeps its table, and a table that was whole when the run was trained lacks each axis that came later; to
    refuse it would put old checkpoints out of reach. A table that someone writes is filled in the same way, in silence:
    rules decide where numbers lie and never what they are, and a default that clashes with another rule is named when
    it would cut an array twice. UserError where a rule is malformed or names an unknown axis.
    """
    known = dict(DEFAULT_RULES)
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise UserError(f"parallel.rules: {rule!r} is not a pair (logical axis, mesh axes)")
        logical, found = rule
        if logical not in known:
            raise UserError(f"parallel.rules: there is no logical axis {logical!r}{suggest(logical, known)}")
        for name in () if found is None else found if isinstance(found, tuple) else (found,):
            if name not in MESH_AXES:
                near = suggest(str(name), MESH_AXES)
                raise UserError(f"parallel.rules: {logical!r} -> {name!r}: there is no such mesh axis{near}")
    return tuple((known | dict(rules)).items())


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> Iterator[None]:
    """Inside, arrays are laid out on `mesh` by `rules`. A command enters this once, around all its work."""
    with jax.set_mesh(mesh), _rules(tuple(rules)):
        yield


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
        found = table[name] if name is not None else None
        found = (found,) if isinstance(found, str) else tuple(found or ())
        found = tuple(a for a in found if a in mesh.axis_names and a not in manual)
        if shape is not None and shape[i] % math.prod(mesh.shape[a] for a in found):
            found = ()
        if twice := [a for a in found if a in used]:
            raise UserError(
                f"parallel.rules: {twice[0]!r} would cut two dimensions of ({', '.join(map(str, logical))})"
            )
        used += found
        entries.append(found if len(found) > 1 else found[0] if found else None)
    return P(*entries)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pin an activation's sharding by logical axes; nothing happens without a mesh or inside pmap."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) == set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical, x.shape))


def shardings(axes: Any, shapes: Any) -> Any:
    """NamedShardings of a tree on the mesh of `use_mesh`; `axes`: a tuple of logical axes for each leaf of `shapes`."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape)), shapes, axes)
