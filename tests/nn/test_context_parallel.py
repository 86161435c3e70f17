"""Attention over rows that devices share: the order of queries, the collectives, and blocks that divide the chunks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn import blockwise, context_parallel
from llmjax.nn.kernels import KERNELS
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from tests.batches import packed

MESH = MeshConfig(data=2, sequence=4)
SEQ, HEADS, WIDTH = 64, 4, 8


def attend(kernel: str, q, k, v, segments, positions):
    mask = KERNELS[kernel].make_mask(segments, positions, causal=True)
    return mask.attend(q, k, v)


def inputs() -> tuple:
    """q, k and v of two rows, with half as many heads of keys as of queries, and the segments and positions."""
    rng, batch = np.random.default_rng(0), packed(2, SEQ, 50)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, SEQ, heads, WIDTH)), jnp.float32)
    return draw(HEADS), draw(HEADS // 2), draw(HEADS // 2), batch.segments, batch.positions


def test_devices_take_one_chunk_from_each_end():
    for shards in (1, 2, 3, 8):
        order = context_parallel._balanced_order(shards)
        assert sorted(order) == list(range(2 * shards))
        for device in range(shards):
            even, odd = order[2 * device : 2 * device + 2]
            assert even + odd == 2 * shards - 1 and even % 2 == 0


def test_the_exchange_puts_chunks_in_order_and_back():
    mesh, order = make_mesh(MeshConfig(data=1, sequence=8)), context_parallel._balanced_order(8)
    x = jnp.arange(32.0)[None]
    spec = jax.sharding.PartitionSpec(None, "sequence")
    move = lambda **options: jax.shard_map(
        lambda x: context_parallel._exchange(x, order=order, mesh_axes=("sequence",), **options),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    there = jax.jit(move())(x)
    np.testing.assert_array_equal(there.reshape(16, 2), x.reshape(16, 2)[np.array(order)])
    np.testing.assert_array_equal(jax.jit(move(inverse=True))(there), x)


@pytest.mark.parametrize(("kernel", "exchanges"), [("dot", 0), ("blockwise", 4)])
def test_keys_and_values_are_gathered_and_nothing_else(kernel, exchanges):
    """The forward pass: all-gathers of keys and values; balanced kernels send two halves of queries and back."""
    q, k, v, segments, positions = inputs()
    with axes.use_mesh(make_mesh(MESH)):
        split = jax.NamedSharding(jax.sharding.get_mesh(), axes.spec(("batch", "seq")))
        rows = jax.NamedSharding(jax.sharding.get_mesh(), axes.spec(("batch",)))
        arguments = *(jax.device_put(x, split) for x in (q, k, v)), *jax.device_put((segments, positions), rows)
        compiled = jax.jit(attend, static_argnums=0).lower(kernel, *arguments).compile()
        expected = attend("dot", q, k, v, segments, positions)
        # float32 sums of up to 64 terms in another order; nobody reads the result of padding
        np.testing.assert_allclose(compiled(*arguments)[segments > 0], expected[segments > 0], atol=3e-6)
    text = compiled.as_text()
    gathered = re.findall(r"= (\S+) all-gather\(", text)
    assert gathered and all(f"[1,{SEQ},{HEADS // 2},{WIDTH}]" in shape for shape in gathered), gathered
    assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == exchanges
    assert " all-to-all(" not in text


@pytest.mark.parametrize(
    ("seq", "rule", "one_segment"),
    [
        (248, {"causal": True, "window": 30}, False),
        (256, {"causal": False}, False),
        (256, {"causal": True}, True),
    ],
    ids=["window, chunks that are padded", "both sides", "one segment"],
)
def test_splash_equals_dot_on_rows_that_devices_share(seq, rule, one_segment):
    """Interpreted; values and gradients, packed rows. Each device has its own blocks of the mask."""
    rng, batch = np.random.default_rng(0), packed(2, seq, 50)
    segments, positions = jnp.asarray(batch.segments), jnp.asarray(batch.positions)
    if one_segment:
        segments = jnp.minimum(segments, 1)
        positions = jnp.arange(seq) * segments
    arrays = [jnp.asarray(rng.normal(size=(2, seq, heads, WIDTH)), jnp.float32) for heads in (4, 2, 2)]
    weights = jnp.asarray(rng.normal(size=(2, seq, 4, WIDTH)), jnp.float32) * (segments > 0)[..., None, None]

    def total(arrays, kernel, segments, **options):
        out = KERNELS[kernel].make_mask(segments, positions, **rule, **options).attend(*arrays)
        return jnp.sum(out * weights), out

    run = lambda *arguments, **options: jax.value_and_grad(total, has_aux=True)(arrays, *arguments, **options)
    (_, expected), expected_grads = run("dot", segments)
    with axes.use_mesh(make_mesh(MESH)):
        (_, out), grads = jax.jit(lambda: run("splash", None if one_segment else segments, block=128))()
    # float32 sums of up to 256 terms of size 1 in another order
    scored = np.asarray(segments > 0)
    np.testing.assert_allclose(out[scored], expected[scored], atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-5)


def test_blocks_divide_the_chunks_of_every_device():
    assert blockwise._block_size(1000, 256) == 256 and blockwise._block_size(100, 256) == 100
    with axes.use_mesh(make_mesh(MESH)):
        assert blockwise._block_size(4096, 256) == 256  # chunks of 512
        assert blockwise._block_size(3072, 256) == 128  # of 384
        assert blockwise._block_size(64, 256) == 8
        assert blockwise._block_size(68, 256) == 68  # four devices do not share it


def test_rows_that_the_devices_cannot_share_are_not_split():
    with axes.use_mesh(make_mesh(MESH)):
        assert context_parallel.num_shards(64) == 4 and context_parallel.num_shards(68) == 1
