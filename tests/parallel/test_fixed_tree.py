"""Sums in one order, wherever their parts are: against the same tree in numpy, bitwise."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec as P
import numpy as np
import pytest

from llmjax.parallel import fixed_tree


def tree_sum(parts: np.ndarray) -> np.ndarray:
    """The pairwise sum over the first dimension."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


def on_devices(function, size, *arrays, out=None):
    """`function` on each of `size` devices along fsdp, with a part of the first dimension of each array."""
    mesh = Mesh(np.array(jax.devices()[:size]), ("fsdp",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=out or P(), check_vma=False)
    return jax.jit(mapped)(*arrays)


def values(*shape):
    """Numbers of very different sizes, so that another order of a sum gives other bits."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 4, shape)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_sum_over_devices_is_that_of_the_tree(size):
    x = values(size, 3, 5)  # 15 numbers a device: not divisible by the devices
    total = on_devices(lambda x: fixed_tree.sum_over("fsdp", {"a": x[0], "b": x[0, 0, 0]}), size, x)
    np.testing.assert_array_equal(total["a"], tree_sum(x))
    np.testing.assert_array_equal(total["b"], tree_sum(x[:, 0, 0]))


def test_the_values_tell_orders_apart():
    x = values(8, 64)
    assert (functools.reduce(np.add, x) != tree_sum(x)).any()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_micro_steps_are_added_in_the_tree(count):
    x = values(count, 7)
    total = jax.jit(lambda x, one: fixed_tree.sum_micro_steps(lambda i: x[i], count, one))(x, jnp.int32(1))
    np.testing.assert_array_equal(total, tree_sum(x))


@pytest.mark.parametrize("size", [2, 8])
def test_gathered_weights_have_gradients_in_the_tree(size):
    """A matrix that is cut along its second dimension, and a vector of 3 that every device has."""
    matrix, vector, scale = values(4, 16), values(3), values(size, 1)

    def gradients(scale, part):
        part = part.reshape(4, -1)  # from [columns / size, 4]
        shards = [
            fixed_tree.Shard.of(part, 1, stacked=False),
            fixed_tree.Shard.of(jnp.asarray(vector), None, stacked=False),
        ]

        def loss(arrays):
            whole = [fixed_tree.Shard(a, s.dim, s.shape) for a, s in zip(arrays, shards, strict=True)]
            w, v = fixed_tree.gather_shards(whole)
            return scale[0, 0] * (jnp.sum(w * matrix) + jnp.sum(v))

        grad, small = jax.grad(loss)([shard.array for shard in shards])
        return grad.reshape(1, 4, -1), small[None]

    columns = np.ascontiguousarray(matrix.reshape(4, size, -1).swapaxes(0, 1)).reshape(size * 4, -1)
    grad, small = on_devices(gradients, size, scale, columns, out=P("fsdp"))
    expected = tree_sum(scale[:, :, None] * matrix[None])
    np.testing.assert_array_equal(np.concatenate(list(grad), axis=1), expected)
    np.testing.assert_array_equal(np.ravel(small)[:3], np.full(3, tree_sum(scale)[0]))
