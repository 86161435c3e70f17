"""A small state with every kind of leaf that checkpoints hold, and its abstract form on any mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax

# Leaf name -> the dimension that is sharded over all devices.
_SHARDED = {"up": 1, "embed": 0}


def make_mesh(*shape: int) -> Mesh:
    """A mesh of the axes data, fsdp and tensor over the first devices."""
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def tree(step: int) -> dict:
    """Host arrays: float32, bfloat16, int32, bool, scalars, in dicts and optax's named tuples."""
    rng = np.random.default_rng(step)
    params = {
        "blocks": {
            "up": rng.standard_normal((2, 16, 64), np.float32),
            "scale": rng.standard_normal((2, 64), np.float32).astype(jnp.bfloat16),
        },
        "embed": rng.standard_normal((64, 64), np.float32),
    }
    moments = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype), params)
    opt_state = (
        optax.ScaleByAdamState(count=np.int32(step), mu=moments, nu=moments),
        optax.EmptyState(),
        {"frozen": np.array([True, False, True])},
    )
    return {"params": params, "opt_state": opt_state}


def shardings(mesh: Mesh) -> dict:
    """Shardings of `tree`: some leaves are sharded over all devices, others are replicated."""

    def choose(path, leaf):
        dim = _SHARDED.get(jax.tree_util.keystr(path[-1:], simple=True))
        return NamedSharding(mesh, P() if dim is None else P(*[None] * dim, mesh.axis_names))

    return jax.tree_util.tree_map_with_path(choose, tree(0))


def state(mesh: Mesh, step: int) -> dict:
    """`tree(step)` on the devices of `mesh`."""

    def to_devices(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(to_devices, tree(step), shardings(mesh))


def abstract(mesh: Mesh) -> dict:
    """The shapes, types and shardings of the state on `mesh`, as a restore takes them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree(0), shardings(mesh)
    )
