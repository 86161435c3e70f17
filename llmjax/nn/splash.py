"""Splash attention on TPU: JAX's Pallas kernel, which leaves out the blocks that a causal mask or a window hides.

It is part of JAX, so it adds no dependency. Its memory is linear in the sequence length.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.parallel import axes

LANES = 128  # blocks are multiples of it

# Queries and keys of a block: the largest that fit in the compiler's default limit of a kernel's memory on TPU v5e, v5p
# and v6e, for heads of up to _WIDE, and for wider ones up to 256. With a higher limit 2048 fits for a width of 128.
_BLOCK, _BLOCK_OF_WIDE, _WIDE = 1024, 512, 192
_COMPUTE_BLOCK = 512  # keys of the forward kernel's inner step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplashMask:
    """Which keys a query sees: those of its segment, and by place in the row as `causal` and a window allow.

    segments      int [batch, s], of the queries; None: a row is one segment, and the kernel reads no segments
    key_segments  int [batch, t], or None
    index         int []: which of `windows` applies
    windows       a query sees only keys less than this many places away; None: all
    causal        whether a query sees no later key
    block         queries and keys of a block, at most; 0: the default for the device
    """

    segments: jax.Array | None
    key_segments: jax.Array | None
    index: jax.Array
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    causal: bool = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    def select(self, other: "SplashMask", use_other: jax.Array) -> "SplashMask":
        """`other` where the traced flag is True, else self; both are masks of the same rows."""
        index = jnp.where(use_other, len(self.windows) + other.index, self.index)
        return dataclasses.replace(self, index=index, windows=self.windows + other.windows)


def splash_mask(
    segments: jax.Array | None,
    positions: jax.Array,
    *,
    causal: bool,
    prefix: None = None,
    window: int | None = None,
    block: int = 0,
) -> SplashMask:
    """The SplashMask that allows what `nn.attention.attention_mask` allows for the same arguments.

    Segments must be contiguous and positions count up by one inside them, so that places in the row replace positions;
    only padding (segment 0), whose result nobody reads, may be otherwise. Segments may be None if `causal`, which hides
    the padding of a row. The kernel has no prefixes.
    """
    assert causal or segments is not None, "every position of a row would see its padding"
    return SplashMask(segments, segments, jnp.int32(0), (window,), causal, block)


def cross_splash_mask(segments: jax.Array, key_segments: jax.Array, *, block: int = 0) -> SplashMask:
    """The SplashMask of queries [batch, s] that see the keys [batch, t] of their segment."""
    return SplashMask(segments, key_segments, jnp.int32(0), (None,), False, block)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: SplashMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    bias: None = None,
) -> jax.Array:
    """Attention with the result of `nn.attention.dot`, to rounding, for queries that see a key.

    Shapes and arguments as in `dot`, except for the mask; the kernel has no bias. On a mesh every device computes its
    rows and heads. The output and the logarithm of the softmax's sum carry the checkpoint name "attention". On CPU the
    kernel is interpreted, which is slow and meant for tests.
    """
    heads, head_dim = q.shape[2:]
    q = q * jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype)
    rows = axes.spec(("batch", None, "heads", None), q.shape)
    if axes.spec(("batch", None, "kv_heads", None), k.shape) != rows:
        # The devices do not hold the key heads of their own queries.
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    attend = functools.partial(_attend, mask.windows, mask.causal, mask.block, softcap)
    arguments = (q, k, v, mask.segments, mask.key_segments, mask.index, sinks)
    mesh = jax.sharding.get_abstract_mesh()
    auto_axes = set(mesh.axis_names) - set(mesh.manual_axes)
    if not auto_axes:
        return attend(*arguments)
    by_row = None if mask.segments is None else P(rows[0])
    return jax.shard_map(
        attend,
        in_specs=(rows, rows, rows, by_row, by_row, P(), None if sinks is None else P(rows[2])),
        out_specs=rows,
        axis_names=auto_axes,
        check_vma=False,  # the kernel's outputs do not say over which axes they vary
    )(*arguments)


def _attend(
    windows: tuple[int | None, ...],
    causal: bool,
    block: int,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    key_segments: jax.Array | None,
    index: jax.Array,
    sinks: jax.Array | None,
) -> jax.Array:
    """The rows and heads of one device. q is scaled; other arguments as in `splash` and SplashMask."""
    device, s = axes.device(), q.shape[1]
    largest = block or (_BLOCK if max(q.shape[3], v.shape[3]) <= _WIDE else _BLOCK_OF_WIDE)
    block_q, block_kv = (_block(length, largest) for length in (s, k.shape[1]))
    ids = None
    if segments is not None and key_segments is not None:
        ids = splash_attention.SegmentIds(_pad(segments, block_q), _pad(key_segments, block_kv))
    q, k, v = _pad(q, block_q), _pad(k, block_kv), _pad(v, block_kv)
    sizes = splash_attention.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_divisor(block_kv, _COMPUTE_BLOCK),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        use_fused_bwd_kernel=True,
    )

    def with_window(window: int | None) -> Callable[..., Any]:
        head_mask = _head_mask((q.shape[1], k.shape[1]), causal, window)
        kernel = splash_attention.make_splash_mha(
            mask=splash_attention.MultiHeadMask([head_mask] * q.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name="attention",
            interpret=device.platform == "cpu",
        )
        row = lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids, sinks=sinks)
        return jax.vmap(row)

    by_head = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.lax.switch(index, [with_window(window) for window in windows], *by_head, ids)
    return out.swapaxes(1, 2)[:, :s]


def _head_mask(shape: tuple[int, int], causal: bool, window: int | None) -> splash_attention.Mask:
    """The mask of a head, with shape (queries, keys)."""
    if window is not None and window < max(shape):
        return splash_attention.LocalMask(shape, window_size=(window - 1, 0 if causal else window - 1), offset=0)
    return splash_attention.CausalMask(shape) if causal else splash_attention.FullMask(shape)


def _block(length: int, largest: int) -> int:
    """Block size for rows of `length`: as many blocks as `largest` needs, of equal size, so that little is padded."""
    count = -(-length // largest)
    return -(-length // (count * LANES)) * LANES


def _divisor(block: int, largest: int) -> int:
    """The largest multiple of LANES up to `largest` that divides `block`."""
    return next(size for size in range(min(block, largest), 0, -LANES) if block % size == 0)


def _pad(x: jax.Array, block: int) -> jax.Array:
    """x [batch, length, ...] with zeros (and so segment 0) up to a multiple of `block`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
