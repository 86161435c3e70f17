"""Splash attention on TPU: JAX's Pallas kernel, which leaves out the blocks that a causal mask or a window hides.

It is part of JAX, so it adds no dependency. Its memory is linear in the sequence length.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from llmjax.parallel import axes

LANES = 128  # blocks are multiples of it

# Queries and keys of a block: the largest that fit in the compiler's default limit of a kernel's memory on TPU v5e, v5p
# and v6e, for heads of up to _WIDE, and for wider ones up to 256. With a higher limit 2048 fits for a width of 128.
_BLOCK, _BLOCK_OF_WIDE, _WIDE = 1024, 512, 192
_COMPUTE_BLOCK = 512  # keys of the forward kernel's inner step
# The backward kernel that computes all gradients at once writes a part of the queries' gradient for each block of keys.
# For rows of more blocks than these a kernel of its own computes that gradient, so that memory stays linear.
_MAX_PARTS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplashMask:
    """Which keys a query sees: those of its segment, and by place in the row as `causal` and a window allow.

    segments      int [batch, s], of the queries; None: a row is one segment, and the kernel reads no segments
    key_segments  int [batch, t], or None
    index         int []: which of `windows` applies
    shard         int [1], the number of the device among those that share a row; int [devices] before they are split
    windows       a query sees only keys less than this many places away; None: all
    causal        whether a query sees no later key
    block         queries and keys of a block, at most; 0: the default for the device
    order         the chunks of a row that devices have, two each, if they share its queries as
                  `nn.context_parallel.split_rows` does; (): each has whole rows
    """

    segments: jax.Array | None
    key_segments: jax.Array | None
    index: jax.Array
    shard: jax.Array
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    causal: bool = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    order: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

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
    return SplashMask(segments, segments, jnp.int32(0), jnp.zeros(1, jnp.int32), (window,), causal, block)


def cross_splash_mask(segments: jax.Array, key_segments: jax.Array, *, block: int = 0) -> SplashMask:
    """The SplashMask of queries [batch, s] that see the keys [batch, t] of their segment."""
    return SplashMask(segments, key_segments, jnp.int32(0), jnp.zeros(1, jnp.int32), (None,), False, block)


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
    mesh = jax.sharding.get_abstract_mesh()
    auto_axes = set(mesh.axis_names) - set(mesh.manual_axes)
    attend = functools.partial(_attend, softcap)
    if not auto_axes:
        return attend(q, k, v, mask, sinks)
    rows = axes.spec(("batch", None, "heads", None), q.shape)
    if axes.spec(("batch", None, "kv_heads", None), k.shape) != rows:
        # The devices do not hold the key heads of their own queries.
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    by_row = None if mask.segments is None else P(rows[0])
    mask_specs = dataclasses.replace(mask, segments=by_row, key_segments=by_row, index=P(), shard=P())
    return jax.shard_map(
        attend,
        in_specs=(rows, rows, rows, mask_specs, None if sinks is None else P(rows[2])),
        out_specs=rows,
        axis_names=auto_axes,
        check_vma=False,  # the kernel's outputs do not say over which axes they vary
    )(q, k, v, mask, sinks)


def _attend(
    softcap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask, sinks: jax.Array | None
) -> jax.Array:
    """The rows and heads of one device. q is scaled; other arguments as in `splash`."""
    device, s = axes.device(), q.shape[1]
    largest = mask.block or (_BLOCK if max(q.shape[3], v.shape[3]) <= _WIDE else _BLOCK_OF_WIDE)
    block_q, block_kv = (_block(length, largest) for length in (s, k.shape[1]))
    ids = None
    if mask.segments is not None and mask.key_segments is not None:
        ids = splash_attention.SegmentIds(_pad(mask.segments, block_q), _pad(mask.key_segments, block_kv))
    q, k, v = _pad(q, block_q), _pad(k, block_kv), _pad(v, block_kv)
    is_fused = k.shape[1] <= _MAX_PARTS * block_kv
    sizes = splash_attention.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_divisor(block_kv, _COMPUTE_BLOCK),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=None if is_fused else block_q,
        block_kv_dq=None if is_fused else block_kv,
        use_fused_bwd_kernel=is_fused,
    )
    places = _places(s, q.shape[1], mask.order)

    def with_window(window: int | None) -> Callable[..., Any]:
        kernel = splash_attention.make_splash_mha(
            mask=splash_attention.MultiHeadMask([_head_mask(places, k.shape[1], mask.causal, window)] * q.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=len(places),
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name="attention",
            interpret=device.platform == "cpu",
        )
        kernel = kernel if len(places) == 1 else _own_shard(kernel, len(places), mask.shard[0])
        row = lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids, sinks=sinks)
        return jax.vmap(row)

    by_head = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.lax.switch(mask.index, [with_window(window) for window in mask.windows], *by_head, ids)
    return out.swapaxes(1, 2)[:, :s]


def splash_mask_axes(mask: SplashMask) -> SplashMask:
    """The logical axes of each array of a SplashMask; "seq" is that of the queries."""
    if mask.segments is None:
        return dataclasses.replace(mask, index=(), shard=("seq",))
    return dataclasses.replace(mask, segments=("batch", "seq"), key_segments=("batch", None), index=(), shard=("seq",))


def reorder_splash_queries(mask: SplashMask, order: Sequence[int]) -> SplashMask | None:
    """The mask for queries that were cut into len(order) equal chunks and put into this order; None: all see alike."""
    if not mask.causal and set(mask.windows) == {None}:
        return None
    segments = mask.segments
    if segments is not None:
        chunks = segments.reshape(segments.shape[0], len(order), -1)
        segments = chunks[:, np.array(order)].reshape(segments.shape)
    return dataclasses.replace(mask, segments=segments, shard=jnp.arange(len(order) // 2), order=tuple(order))


def _places(length: int, padded: int, order: Sequence[int]) -> np.ndarray:
    """The place in the row of each query, [devices that share a row, padded]; `length` of a device's are no padding."""
    chunks = np.arange(length * max(1, len(order) // 2), dtype=np.int32).reshape(max(1, len(order)), -1)
    places = chunks[list(order)] if order else chunks
    return np.pad(places.reshape(-1, length), ((0, 0), (0, padded - length)), mode="edge")


def _own_shard(kernel: Any, shards: int, index: jax.Array) -> Any:
    """The kernel of the queries of device `index`, from that of all `shards` devices that share a row.

    Its arrays are [heads or 1, blocks of queries, blocks of keys] and [queries].
    """

    def cut(x: jax.Array) -> jax.Array:
        axis = min(1, x.ndim - 1)
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

    return jax.tree.map(cut, kernel)


def _head_mask(places: np.ndarray, keys: int, causal: bool, window: int | None) -> splash_attention.Mask:
    """The mask of a head for queries at `places` [devices, queries]."""
    before = window - 1 if window is not None and window < max(places.size, keys) else None
    if not causal and before is None:
        return splash_attention.FullMask((places.size, keys))
    after = 0 if causal or before is None else before
    return _BandMask(places.reshape(-1), keys, before, after)


class _BandMask(splash_attention.Mask):
    """A query sees the keys from `before` places before it to `after` places after it; `before` None: all of these.

    places  int32 [queries], the place of each in the row, in any order
    keys    their number

    JAX's masks have these rules for queries in the order of the row. They also compute every element of every block,
    which takes minutes for a row of 131,072 tokens. Here a block that is all True or all False comes as one element: of
    such a block JAX asks no more than that.
    """

    def __init__(self, places: np.ndarray, keys: int, before: int | None, after: int):
        self.q_sequence = places  # by this name and `mask_function` the kernel finds what it computes the mask from
        self._keys, self._before, self._after = keys, before, after

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, keys)"""
        return len(self.q_sequence), self._keys

    def mask_function(self, queries: Any, keys: Any) -> Any:
        """Whether queries see keys, by their places; the arguments broadcast."""
        visible = (queries if self._after == 0 else queries + self._after) >= keys
        return visible if self._before is None else visible & (queries - self._before <= keys)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        places, keys = self.q_sequence[index[0]], np.arange(index[1].start, index[1].stop, dtype=np.int32)
        # The most that a query lies before a key, and after it.
        before, after = keys[-1] - places.min(), places.max() - keys[0]
        if before <= self._after and (self._before is None or after <= self._before):
            return np.array([[True]])
        nearest_before, nearest_after = keys[0] - places.max(), places.min() - keys[-1]
        if nearest_before > self._after or (self._before is not None and nearest_after > self._before):
            return np.array([[False]])
        return self.mask_function(places[:, None], keys[None, :])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BandMask) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[Any, ...]:
        return self.q_sequence.tobytes(), self._keys, self._before, self._after


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
