"""A fingerprint is equal on every mesh, and differs for every other value."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import ml_dtypes
import numpy as np
import pytest

from llmjax.checkpoint.fingerprint import digests, fingerprint
from tests.checkpoint.state import make_mesh, state, tree


def test_a_fingerprint_is_equal_on_every_mesh():
    shapes = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 1), (1, 1, 1)]
    fingerprints = {fingerprint(**state(make_mesh(*shape), 5)) for shape in shapes}
    fingerprints.add(fingerprint(**tree(5)))  # numpy arrays
    sharded = jax.device_put(tree(5)["params"]["embed"], NamedSharding(make_mesh(2, 2, 2), P("fsdp", "tensor")))
    params = {**tree(5)["params"], "embed": sharded}
    fingerprints.add(fingerprint(params, tree(5)["opt_state"]))
    assert len(fingerprints) == 1
    assert len(fingerprints.pop()) == 16


def test_the_first_half_is_of_the_parameters_and_the_second_of_the_optimizer_state():
    parts, other = tree(5), tree(6)
    mixed = fingerprint(parts["params"], other["opt_state"])
    assert mixed[:8] == fingerprint(**parts)[:8]
    assert mixed[8:] == fingerprint(**other)[8:]
    assert mixed not in (fingerprint(**parts), fingerprint(**other))


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool", "float8_e4m3fn"]
)
def test_a_flip_of_any_bit_changes_the_digest(dtype):
    """Flips each bit of one element, and one bit of every element."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    bits = 1 if dtype.kind == "b" else 8 * dtype.itemsize
    distinct = {digests({"a": values})["a"]}
    flips = [(7, bit) for bit in range(bits)] + [(element, 0) for element in range(24) if element != 7]
    for element, bit in flips:
        flipped = values.copy()
        flipped.reshape(-1).view(np.uint8)[element * dtype.itemsize + bit // 8] ^= 1 << bit % 8
        distinct.add(digests({"a": flipped})["a"])
    assert len(distinct) == 1 + len(flips)


def test_names_positions_shapes_and_negative_zeros_change_the_digest():
    a, b = np.arange(6.0, dtype=np.float32), np.arange(6.0, dtype=np.float32)[::-1].copy()
    trees = [
        {"x": a, "y": b},
        {"x": b, "y": a},
        {"x": a, "z": b},
        {"x": {"y": a}, "y": b},
        {"x": a.reshape(2, 3), "y": b},
        {"x": a, "y": np.where(b == 0, -0.0, b).astype(np.float32)},
        {"x": np.roll(a, 1), "y": b},
        {"a": np.zeros(3)},
        {"a": np.zeros(4)},
        {"b": np.zeros(3)},
        {},
    ]
    assert len({digests({"p": tree})["p"] for tree in trees}) == len(trees)


def test_a_named_tuple_has_the_digest_of_a_dict_with_its_names():
    from optax import ScaleByAdamState

    named = ScaleByAdamState(count=np.int32(1), mu=np.ones(3), nu=np.zeros(2))
    assert digests({"p": named}) == digests({"p": {"count": np.int32(1), "mu": np.ones(3), "nu": np.zeros(2)}})


def test_random_keys_and_scalars_have_digests():
    distinct = {
        digests({"p": {"k": leaf}})["p"]
        for leaf in (jax.random.key(0), jax.random.key(1), jnp.float32(0), jnp.int32(1))
    }
    assert len(distinct) == 4
