"""Buckets of distances, and biases that restart with each segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.relative import RelativeBias, buckets


def test_buckets_of_t5():
    """Both ways: 16 a side, of which 8 hold one distance; then edges at 8 * 16^(k/8)."""
    actual = buckets(32, 128, bidirectional=True)
    at = lambda distance: int(actual[128 + distance])
    assert [at(-d) for d in range(9)] == list(range(9))
    assert [at(d) for d in (1, 2, 8)] == [17, 18, 24]
    edges = [d for d in range(9, 129) if at(-d) != at(1 - d)]
    assert edges == [12, 16, 23, 32, 46, 64, 91]
    assert at(-128) == 15 and at(128) == 31
    one_way = buckets(32, 128, bidirectional=False)
    assert (one_way[128:] == 0).all() and one_way[0] == 31 and one_way[128 - 15] == 15


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_is_that_of_the_bucket_and_far_distances_share_one(bidirectional):
    bias = RelativeBias(
        jax.random.key(0), 3, num_buckets=8, max_distance=10, bidirectional=bidirectional, std=1.0, dtype="float32"
    )
    table = np.asarray(bias.table[...])
    queries, keys = np.array([[0, 7, 40]]), np.arange(50)[None]
    actual = np.asarray(bias(jnp.asarray(queries), jnp.asarray(keys)))
    assert actual.shape == (1, 3, 3, 50) and actual.dtype == np.float32
    bucket = buckets(8, 10, bidirectional=bidirectional)
    for i, query in enumerate(queries[0]):
        for key in range(50):
            expected = table[bucket[np.clip(key - query, -10, 10) + 10]]
            np.testing.assert_array_equal(actual[0, :, i, key], expected)
    assert (actual[0, :, 2, 0] == actual[0, :, 2, 30]).all() and (actual[0, :, 2, 0] != actual[0, :, 2, 37]).any()


def test_packing_restarts_distances():
    bias = RelativeBias(
        jax.random.key(0), 2, num_buckets=8, max_distance=10, bidirectional=True, std=1.0, dtype="float32"
    )
    packed, alone = jnp.array([[0, 1, 2, 0, 1, 2, 3]]), jnp.arange(4)[None]
    np.testing.assert_array_equal(bias(packed, packed)[..., 3:, 3:], bias(alone, alone))
