"""Grouped matmul: rows sorted by group, each group times its own matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_MAX_TILE, _MIN_TILE = 128, 8  # rows of one matmul on CPU; below, copying the matrix costs more than the product


@jax.custom_vjp
def grouped_matmul(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply the first sizes[0] rows of x by matrices[0], the next sizes[1] rows by matrices[1], and so on.

    x [rows, inputs], matrices [groups, inputs, outputs], sizes int [groups] whose sum is rows. Returns [rows, outputs]
    in x's type.

    On accelerators this is `jax.lax.ragged_dot`. On CPU that would multiply every row by every matrix, so there the
    rows are split into tiles of one group each.
    """
    return jax.lax.platform_dependent(x, matrices, sizes, cpu=_tiled, default=jax.lax.ragged_dot)


def _forward(x, matrices, sizes):
    return grouped_matmul(x, matrices, sizes), (x, matrices, sizes)


def _backward(saved, cotangent):
    x, matrices, sizes = saved
    cotangent = cotangent.astype(x.dtype)
    dx = grouped_matmul(cotangent, matrices.swapaxes(1, 2), sizes)
    d_matrices = jax.lax.platform_dependent(
        x, matrices, sizes, cotangent, cpu=_tiled_gradient, default=_ragged_gradient
    )
    return dx, d_matrices, None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_gradient(x, matrices, sizes, cotangent):
    return jax.vjp(lambda weights: jax.lax.ragged_dot(x, weights, sizes), matrices)[1](cotangent)[0]


def _tiled(x, matrices, sizes):
    tile = _tile(x.shape[0], matrices.shape[0])
    padded = _pad(x, tile)

    def body(out, group, start, _):
        rows = jax.lax.dynamic_slice_in_dim(padded, start, tile)
        product = rows @ jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        # Rows of the next group are wrong here; the next tile overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, 0)

    return _over_tiles(body, jnp.zeros((padded.shape[0], matrices.shape[2]), x.dtype), sizes, tile)[: x.shape[0]]


def _tiled_gradient(x, matrices, sizes, cotangent):
    tile = _tile(x.shape[0], matrices.shape[0])
    x, cotangent = _pad(x, tile), _pad(cotangent, tile)

    def body(total, group, start, count):
        rows = jax.lax.dynamic_slice_in_dim(x, start, tile)
        rows = jnp.where(jnp.arange(tile)[:, None] < count, rows, 0)
        dy = jax.lax.dynamic_slice_in_dim(cotangent, start, tile)
        more = jax.lax.dot_general(rows, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + more, group, 0)

    return _over_tiles(body, jnp.zeros(matrices.shape, jnp.float32), sizes, tile).astype(matrices.dtype)


def _over_tiles(body: Callable[..., Any], out: jax.Array, sizes: jax.Array, tile: int) -> jax.Array:
    """Fold `body(out, group, first row, rows of the group from there on)` over the tiles, in the order of rows."""
    tiles = -(-sizes // tile)
    last_tile, last_row = jnp.cumsum(tiles), jnp.cumsum(sizes)

    def step(i, out):
        group = jnp.searchsorted(last_tile, i, side="right")
        start = last_row[group] - sizes[group] + (i - last_tile[group] + tiles[group]) * tile
        return body(out, group, start, last_row[group] - start)

    return jax.lax.fori_loop(0, last_tile[-1], step, out)


def _tile(rows: int, groups: int) -> int:
    """Rows of a tile: the mean size of a group, rounded up to a power of two."""
    return min(_MAX_TILE, max(_MIN_TILE, 1 << (-(-rows // groups) - 1).bit_length()))


def _pad(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows), (0, 0)))
