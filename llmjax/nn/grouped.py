"""Grouped matmul: rows sorted by group, each group times its own matrix."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
import jax.numpy as jnp

_MAX_TILE, _MIN_TILE = 128, 8  # rows of one matmul on CPU; below, copying the matrix costs more than the product
# Tiles of the TPU kernel: rows, and bytes of a row. In each type a tile of all operands fits the 16 MiB of VMEM that
# the compiler gives a kernel without an option.
_KERNEL_ROWS, _KERNEL_BYTES, _LANES = 512, 2048, 128


@jax.custom_vjp
def grouped_matmul(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply the first sizes[0] rows of x by matrices[0], the next sizes[1] rows by matrices[1], and so on.

    x [rows, inputs], matrices [groups, inputs, outputs], sizes int [groups] whose sum is rows. Returns [rows, outputs]
    in x's type.

    On TPU this is JAX's Pallas kernel of MegaBlocks (Gale et al., 2022, arXiv 2211.15841), on GPU `jax.lax.ragged_dot`.
    On CPU that would multiply every row by every matrix, as on TPU v5e and v6e, so there the rows are split into tiles
    of one group each.
    """
    return jax.lax.platform_dependent(x, matrices, sizes, cpu=_tiled, tpu=tpu_kernel, default=jax.lax.ragged_dot)


def _forward(x, matrices, sizes):
    return grouped_matmul(x, matrices, sizes), (x, matrices, sizes)


def _backward(saved, cotangent):
    x, matrices, sizes = saved
    cotangent = cotangent.astype(x.dtype)
    transposed = lambda dy, matrices, sizes: grouped_matmul(dy, matrices.swapaxes(1, 2), sizes)
    dx = jax.lax.platform_dependent(
        cotangent, matrices, sizes, tpu=functools.partial(tpu_kernel, transposed=True), default=transposed
    )
    d_matrices = jax.lax.platform_dependent(
        x, matrices, sizes, cotangent, cpu=_tiled_gradient, tpu=tpu_kernel_gradient, default=_ragged_gradient
    )
    return dx, d_matrices, None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_gradient(x, matrices, sizes, cotangent):
    return jax.vjp(lambda weights: jax.lax.ragged_dot(x, weights, sizes), matrices)[1](cotangent)[0]


def tpu_kernel(x, matrices, sizes, *, transposed=False, interpret=False):
    """`grouped_matmul` by JAX's Pallas kernel; `transposed`: matrices [groups, outputs, inputs]."""
    outputs = matrices.shape[1 if transposed else 2]
    padded = _pad_to(x, _KERNEL_ROWS)
    # Rows of padding belong to no group: the kernel does not compute them.
    out = gmm(padded, matrices, sizes, x.dtype, _tiling(x, outputs), transpose_rhs=transposed, interpret=interpret)
    return out[: x.shape[0]]


def tpu_kernel_gradient(x, matrices, sizes, cotangent, *, interpret=False):
    """The gradient of the matrices by the kernel's transposed form."""
    tiling = _tiling(x, cotangent.shape[1])
    x, cotangent = _pad_to(x, _KERNEL_ROWS), _pad_to(cotangent, _KERNEL_ROWS)
    return tgmm(x.swapaxes(0, 1), cotangent, sizes, matrices.dtype, tiling, interpret=interpret)


def _tiling(x: jax.Array, outputs: int) -> tuple[int, int, int]:
    """Rows, inputs and outputs of a tile of the kernel."""
    largest = _KERNEL_BYTES // x.dtype.itemsize
    side = lambda size: min(largest, -(-size // _LANES) * _LANES)
    return _KERNEL_ROWS, side(x.shape[1]), side(outputs)


def _pad_to(x: jax.Array, multiple: int) -> jax.Array:
    return _pad(x, -x.shape[0] % multiple)


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
