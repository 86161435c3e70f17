"""The attention kernels: what each supports, and which one a model uses on a platform."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax

from llmjax.errors import UserError
from llmjax.nn import context_parallel
from llmjax.nn.attention import attention_mask, dot
from llmjax.nn.blockwise import block_mask, blockwise, cross_block_mask, mask_axes, reorder_queries
from llmjax.nn.cudnn import cudnn
from llmjax.nn.relative import RelativeBias
from llmjax.nn.splash import cross_splash_mask, reorder_splash_queries, splash, splash_mask, splash_mask_axes

# What a model may need besides attention inside segments, causal or not.
FEATURES = {
    "scale": "another scale of the scores",
    "softcap": "a soft-cap of the scores",
    "sinks": "attention sinks",
    "window": "windows",
    "pattern": "windows that differ between layers",
    "prefix": "prefixes of each row's own length",
    "bias": "a bias on the scores",
    "cross": "attention to another sequence",
    "float32": "float32",
    "wide_heads": "heads wider than 128",
    "value_width": "values of another width than the keys",
    "sequence": "rows whose positions are split over devices",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, in the form of the kernel that reads it.

    value    as the kernel's `mask_fn` or `cross_mask_fn` returns it
    kernel   its name in KERNELS
    """

    value: Any
    kernel: str = dataclasses.field(metadata={"static": True})

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        sinks: jax.Array | None = None,
        bias: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """The kernel's attention; where the mesh splits the positions of a row, each device computes its own queries.

        Arguments as in `Kernel.attention_fn`; `options` are its scale and softcap.
        """
        kernel = KERNELS[self.kernel]
        attention_fn = functools.partial(kernel.attention_fn, **options)
        if context_parallel.num_shards(q.shape[1]) == 1 or kernel.mask_axes is None:
            return attention_fn(q, k, v, self.value, sinks=sinks, bias=bias)
        return context_parallel.split_rows(
            attention_fn,
            (q, k, v),
            self.value,
            kernel.mask_axes,
            sinks=sinks,
            bias=bias,
            bias_axes=kernel.bias_axes,
            reorder_queries=kernel.reorder_queries,
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute attention. Masks and biases have a form of its own, computed once for all layers.

    attention_fn   (q [batch, s, heads, head_dim], k and v [batch, t, kv_heads, head_dim], mask, *, scale, softcap,
                   sinks, bias) -> like q; arguments as in `dot`
    mask_fn        arguments of `attention_mask` and `block` -> that mask; block: of queries and keys, 0 for the
                   kernel's default
    cross_mask_fn  segments of queries and keys, int [batch, s] and [batch, t], and `block` -> the mask of keys of the
                   same segment
    supports       the FEATURES that it can compute; a config that needs another one is refused
    bias_fn        (RelativeBias, positions int [batch, seq]) -> the bias of self-attention; None: it has none
    platforms      on which it runs
    max_seq_len    the longest rows that it can compute; None: any
    mask_axes      mask -> the logical axes of each of its arrays, where "seq" stands for queries; None: it cannot
                   compute rows that are split over devices
    bias_axes      the logical axes of the bias
    reorder_queries  as in `context_parallel.split_rows`; None: masked scores are computed as well
    """

    name: str
    attention_fn: Callable[..., jax.Array]
    mask_fn: Callable[..., Any]
    cross_mask_fn: Callable[..., Any]
    supports: frozenset[str]
    bias_fn: Callable[[RelativeBias, jax.Array], jax.Array] | None = None
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    max_seq_len: int | None = None
    mask_axes: Callable[[Any], Any] | None = None
    bias_axes: tuple[str | None, ...] = ()
    reorder_queries: Callable[[Any, Sequence[int]], Any] | None = None

    def make_mask(self, segments: jax.Array | None, positions: jax.Array, *, block: int = 0, **rule: Any) -> Mask:
        """The mask of self-attention; `rule` as in `attention_mask`."""
        return Mask(self.mask_fn(segments, positions, block=block, **rule), self.name)

    def make_cross_mask(self, segments: jax.Array, key_segments: jax.Array, *, block: int = 0) -> Mask:
        """The mask of queries that see the keys of their segment."""
        return Mask(self.cross_mask_fn(segments, key_segments, block=block), self.name)

    def make_bias(self, relative: RelativeBias, positions: jax.Array) -> jax.Array:
        """The bias of self-attention by distance, positions int [batch, seq], in the kernel's form."""
        assert self.bias_fn is not None, f"{self.name} does not support a bias"
        return self.bias_fn(relative, positions)

    def find_obstacle(self, needs: Mapping[str, str], platform: str, seq_len: int) -> str | None:
        """Why the kernel cannot be used, None if it can; arguments as in `resolve_attention`."""
        if platform not in self.platforms:
            return f"{self.name} runs on {', '.join(self.platforms)}, not on {platform}"
        if unsupported := self.find_unsupported(needs):
            return unsupported
        if self.max_seq_len is not None and seq_len > self.max_seq_len:
            return f"{self.name} takes rows of at most {self.max_seq_len} tokens (data.seq_len={seq_len})"
        return None

    def find_unsupported(self, needs: Mapping[str, str]) -> str | None:
        """The part of `find_obstacle` that the model decides alone."""
        for feature, setting in needs.items():
            if feature not in self.supports:
                return f"{self.name} does not support {FEATURES[feature]} ({setting})"
        return None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel that a model uses: its name in KERNELS, and why."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.reason})"


# The longest rows for which "auto" takes dot are shorter than this. blockwise needs a tenth of dot's memory here
# (docs/benchmarks.md), and dot is the reference: short rows, such as those of tests, keep its bits.
BLOCKWISE_SEQ_LEN = 2048
# The fastest kernel of a platform. It is used where it supports what the model needs.
_FASTEST = {"tpu": "splash", "gpu": "cudnn"}


def resolve_attention(name: str, needs: Mapping[str, str], platform: str, seq_len: int) -> Choice:
    """The kernel for model.attention=`name`, which is "auto" or a name in KERNELS.

    needs      FEATURES that the model uses, each with the setting that asks for it, such as "model.window=8"
    platform   "cpu", "gpu" or "tpu"
    seq_len    tokens of the longest row

    "auto" takes splash on TPU and cudnn on GPU. Where these cannot compute what the model needs, it takes blockwise on
    TPU; on GPU, as on CPU, dot for short rows and blockwise for long ones. Raises UserError where the named kernel
    cannot be used.
    """
    if name != "auto":
        obstacle = KERNELS[name].find_obstacle(needs, platform, seq_len)
        if obstacle:
            raise UserError(f"model.attention={name!r}: {obstacle}; set it to 'auto' or 'blockwise'")
        return Choice(name, "model.attention")
    why = platform
    if fastest := _FASTEST.get(platform):
        obstacle = KERNELS[fastest].find_obstacle(needs, platform, seq_len)
        if not obstacle:
            return Choice(fastest, why)
        why = f"{platform}; {obstacle}"
        if platform == "tpu":
            return Choice("blockwise", why)
    is_short = seq_len < BLOCKWISE_SEQ_LEN
    return Choice("dot" if is_short else "blockwise", f"{why}; rows of {seq_len} tokens")


def _dense_mask(segments: jax.Array | None, positions: jax.Array, *, block: int, **rule: Any) -> jax.Array:
    return attention_mask(segments, positions, **rule)


def _dense_cross_mask(segments: jax.Array, key_segments: jax.Array, *, block: int) -> jax.Array:
    return segments[:, :, None] == key_segments[:, None, :]


_ALL = frozenset(FEATURES)
# What kernels share whose mask has an entry for every pair of a query and a key.
_DENSE: dict[str, Any] = {
    "mask_fn": _dense_mask,
    "cross_mask_fn": _dense_cross_mask,
    "bias_fn": lambda relative, positions: relative(positions, positions),
    "mask_axes": lambda mask: ("batch", "seq", None),
    "bias_axes": ("batch", "heads", "seq", None),
}

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(name="dot", attention_fn=dot, supports=_ALL, **_DENSE),
        Kernel(
            name="blockwise",
            attention_fn=blockwise,
            mask_fn=block_mask,
            cross_mask_fn=cross_block_mask,
            bias_fn=lambda relative, positions: relative.by_distance(positions.shape[1]),
            supports=_ALL,
            mask_axes=mask_axes,
            bias_axes=("heads", None),
            reorder_queries=reorder_queries,
        ),
        Kernel(
            name="splash",
            attention_fn=splash,
            mask_fn=splash_mask,
            cross_mask_fn=cross_splash_mask,
            supports=_ALL - {"prefix", "bias"},
            platforms=("tpu",),
            mask_axes=splash_mask_axes,
            reorder_queries=reorder_splash_queries,
        ),
        Kernel(
            name="cudnn",
            attention_fn=cudnn,
            supports=frozenset({"scale", "window", "pattern", "prefix", "cross", "sequence"}),
            platforms=("gpu",),
            max_seq_len=4096,  # its mask then takes 32 MiB for each row of a batch
            **_DENSE,
        ),
    )
}
