"""A fingerprint of arrays that depends only on names and bits, not on mesh, layout or number of processes."""

from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

# Odd constants, one per dimension, which mix the coordinates of an element: arrays of over 2^32 elements need no 64-bit
# arithmetic. Further dimensions use them again in turn.
_STRIDES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x2C1B3C6D)


def leaf_name(path: tuple) -> str:
    """The dotted name of a leaf, the same whether its parents are dicts, named tuples or dataclasses."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def fingerprint(params: Any, opt_state: Any) -> str:
    """16 hex digits: 8 for the parameters, then 8 for the optimizer state. A collective: all processes call it."""
    return "".join(digests({"params": params, "opt_state": opt_state}).values())


def digests(parts: dict[str, Any]) -> dict[str, str]:
    """8 hex digits for each tree of arrays in `parts`. A collective: all processes call it with the same trees.

    A digest is a sum over all elements modulo 2^32, which does not depend on their order, so it is equal on any
    sharding. Each term hashes an element's bits, its leaf's name and its index by a bijection of the bits. So a change
    of one element always changes the digest, and any other change does so with a probability of about 1 - 2^-32.
    """
    sums = {name: _leaf_sums(tree) for name, tree in parts.items()}
    # Parameters first: jax.tree.map does not keep the order of a dict.
    order = sorted(parts, key=lambda name: (name != "params", name))
    return {name: f"{sums[name] % 2**32:08x}" for name in order}


def _leaf_sums(tree: Any) -> int:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # One leaf after the other: independent programs may start in another order on each CPU process, and their
    # collectives would then wait for each other forever.
    return sum(int(leaf_sum(seed_of(path), leaf)) for path, leaf in leaves)


def seed_of(path: tuple) -> np.uint32:
    """What `leaf_sum` mixes into the sum of the leaf at this path."""
    return np.uint32(zlib.crc32(leaf_name(path).encode()))


@jax.jit
def leaf_sum(seed: jax.Array, leaf: Any) -> jax.Array:
    """One leaf's sum: uint32 scalar. Compiled once for each shape, so parameters and their moments share a program."""
    bits, position = _bits(jnp.asarray(leaf)), seed
    for dim in range(bits.ndim):
        stride = np.uint32(_STRIDES[dim % len(_STRIDES)])
        position = position + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * stride
    hashed = bits ^ position  # then the finaliser of MurmurHash3, whose steps are bijections
    hashed = (hashed ^ (hashed >> 16)) * np.uint32(0x85EBCA6B)
    hashed = (hashed ^ (hashed >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(hashed ^ (hashed >> 16), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The elements' bits as uint32; elements of 8 bytes become two, along a new last dimension."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
