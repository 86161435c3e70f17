"""Store an optimizer's moments in fewer bits: bfloat16, or 8-bit integers with a scale for each block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.batch import Params
from llmjax.optim.layerwise import LogicalAxes, kind

MOMENT_DTYPES = ("float32", "bfloat16", "int8")
BLOCK = 128

# A code c of n levels stands for (c / n)^power times the largest value of its block. A power keeps small values apart
# from 0, as the tree-shaped code of Dettmers et al. does. Second moments are squares, hence twice the power.
_POWERS = {"mu": 2, "nu": 4}
_LEVELS = {"mu": 127, "nu": 255}
_ENTROPY_BITS = 16


class Quantized(NamedTuple):
    """An array in 8 bits (block-wise quantisation: Dettmers et al., 2021, arXiv 2110.02861).

    codes    int8 (first moments) or uint8 (second moments), in the shape of the array
    scales   float32, largest absolute value of each block along one axis, which has the length `blocks` here
    """

    codes: Any
    scales: Any


def store_moments(inner: optax.GradientTransformation, dtype: str, axes: Params) -> optax.GradientTransformation:
    """`inner`, whose state has a `count` and moments `mu` and maybe `nu`, with the moments stored as `dtype`.

    axes   the logical axes of each parameter

    An update is computed from the new moments in float32, before they are rounded. Rounding is stochastic and unbiased:
    to the nearest value, an average would stop to change where an update moves it by less than half a step. The draws
    depend on `count` and on the position of the parameter, so that a resumed run and another mesh repeat them.
    """

    block_axes = [block_axis(names) for names in jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))]

    def map_moments(function: Callable[[Any, str, int, int], Any], state: Any) -> Any:
        """The state with function(leaf, field, block axis, index) in place of each leaf of a moment; indices differ."""
        new, index = {}, 0
        for field in (field for field in _POWERS if hasattr(state, field)):
            leaves, tree = jax.tree.flatten(getattr(state, field), is_leaf=lambda node: isinstance(node, Quantized))
            items = enumerate(zip(leaves, block_axes, strict=True), start=index)
            new[field] = tree.unflatten([function(leaf, field, axis, i) for i, (leaf, axis) in items])
            index += len(leaves)
        return state._replace(**new)

    def encode(x: jax.Array, field: str, axis: int, entropy: jax.Array) -> Any:
        match dtype:
            case "bfloat16":
                return _round_bfloat16(x, entropy)
            case "int8":
                return quantize(x, field, entropy, axis=axis)
            case _:
                return x

    def decode(stored: Any, field: str, axis: int, _: int) -> jax.Array:
        return dequantize(stored, field, axis=axis) if dtype == "int8" else stored.astype(jnp.float32)

    def init(params):
        state = inner.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        return map_moments(lambda x, field, axis, _: _zeros(x.shape, dtype, field, axis), state)

    def update(updates, state, params=None):
        updates, new = inner.update(updates, map_moments(decode, state), params)
        key = jax.random.fold_in(jax.random.key(0), state.count)

        def round_and_encode(x, field, axis, index):
            return encode(x, field, axis, jax.random.bits(jax.random.fold_in(key, index), x.shape, jnp.uint16))

        return updates, map_moments(round_and_encode, new)

    return optax.GradientTransformation(init, update)


def _zeros(shape: tuple[int, ...], dtype: str, field: str, axis: int) -> Any:
    """A moment of zeros. XLA takes minutes to fold the quantisation of a large constant."""
    if dtype != "int8":
        return jnp.zeros(shape, dtype)
    scales = (*shape[:axis], shape[axis] // block_size(shape[axis]), *shape[axis + 1 :])
    return Quantized(jnp.zeros(shape, jnp.int8 if field == "mu" else jnp.uint8), jnp.zeros(scales, jnp.float32))


def block_axis(axes: LogicalAxes) -> int:
    """The axis along which a moment is cut into blocks: the last one, or of a matrix [..., "embed"] the one before.

    Rules shard "embed" over most devices, so that a block along it would be on several of them. Rows of a table are
    cut along "embed" all the same: moments of rare tokens are far smaller than those of frequent ones.
    """
    return len(axes) - (2 if axes[-1] == "embed" and kind(axes) == "matrix" else 1)


def _round_bfloat16(x: jax.Array, entropy: jax.Array) -> jax.Array:
    """Stochastic rounding: the 16 bits that bfloat16 drops are the probability of rounding away from 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + entropy.astype(jnp.uint32)
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    # An infinity or NaN keeps its bits; its update is skipped anyway.
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)


def quantize(x: jax.Array, field: str, entropy: jax.Array, *, axis: int = -1) -> Quantized:
    """float32 x in 8 bits, as the moment `field` ("mu" or "nu", whose values are not negative), in blocks along `axis`.

    entropy   uint16 like x, by which values are rounded up or down without bias
    A second moment above 0 never becomes 0, by which an update would be divided.
    """
    power, levels = _POWERS[field], _LEVELS[field]
    axis %= x.ndim
    blocks = _split_blocks(jnp.abs(x), axis)
    scales = jnp.max(blocks, axis=axis + 1)
    fraction = (blocks / jnp.expand_dims(jnp.where(scales > 0, scales, 1), axis + 1)).reshape(x.shape)
    code = jnp.floor(levels * _root(fraction, power))
    low, high = (code / levels) ** power, ((code + 1) / levels) ** power
    code += (fraction - low) / (high - low) > entropy.astype(jnp.float32) / 2**_ENTROPY_BITS
    if field == "nu":
        code = jnp.where(fraction > 0, jnp.maximum(code, 1), 0)
        return Quantized(jnp.minimum(code, levels).astype(jnp.uint8), scales)
    return Quantized((jnp.sign(x) * jnp.minimum(code, levels)).astype(jnp.int8), scales)


def dequantize(stored: Quantized, field: str, *, axis: int = -1) -> jax.Array:
    """The float32 array that the codes stand for; arguments as in `quantize`."""
    codes, scales = stored
    value = codes.astype(jnp.float32) / _LEVELS[field]
    value = jnp.sign(value) * jnp.abs(value) ** _POWERS[field]
    axis %= codes.ndim
    return (_split_blocks(value, axis) * jnp.expand_dims(scales, axis + 1)).reshape(codes.shape)


def _split_blocks(x: jax.Array, axis: int) -> jax.Array:
    """x with `axis` split into [blocks, elements of a block]."""
    return x.reshape(*x.shape[:axis], -1, block_size(x.shape[axis]), *x.shape[axis + 1 :])


def block_size(size: int) -> int:
    """Elements of a block along an axis of `size`: its largest divisor up to BLOCK."""
    return max(divisor for divisor in range(1, BLOCK + 1) if size % divisor == 0)


def _root(x: jax.Array, power: int) -> jax.Array:
    return jnp.sqrt(x) if power == 2 else jnp.sqrt(jnp.sqrt(x))
