"""Matmuls of linear layers with operands of 8 bits, which are quantized while the model runs, by the package qwix."""

import importlib.util
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.errors import UserError

# Types of activations and weights, and of gradients of activations: e4m3 has more precision, e5m2 more range
# (Micikevicius et al., 2022, arXiv 2209.05433).
_TYPES = {"int8": (jnp.int8, jnp.int8), "float8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
QUANTIZATIONS = ("none", *_TYPES)
# By default qwix maps the largest value to 127.5. The last bit of the scale, which differs between meshes, would decide
# whether that is rounded to 127 or 128; this factor maps it to 127.
_CALIBRATION = {jnp.int8: f"absmax,{127.5 / 127}"}
PRODUCT = "quantized_product"  # checkpoint name of the outputs

# A user context is part of jit's cache key, so that another type compiles another program.
_quantization = jax.make_user_context("none")


def use(quantization: str) -> Any:
    """A context manager. Inside, `linear.project` is traced with operands of one of QUANTIZATIONS."""
    return _quantization(quantization)


def current() -> str:
    """The quantization of `use`; "none" outside."""
    return _quantization.value


def check_installed(quantization: str) -> None:
    """Raise UserError where the config asks for quantization and its package is not installed."""
    if quantization != "none" and importlib.util.find_spec("qwix") is None:
        raise UserError(
            f"model.quantization={quantization!r}: the package qwix is not installed: run "
            "`pip install 'llmjax[quantization]'`, or set it to 'none'"
        )


def project(
    x: jax.Array, weight: jax.Array, num_inputs: int, out_dtype: jax.typing.DTypeLike, quantization: str
) -> jax.Array:
    """x [..., *inputs] times weight [*inputs, *outputs] -> [..., *outputs], both quantized.

    Each row of x and each output of the weight has a scale, so that its largest absolute value becomes the type's
    largest number. Products are summed in int32 or float32, and multiplied by both scales in float32.
    """
    check_installed(quantization)
    import qwix  # not part of the plain installation

    dtype, _ = _TYPES[quantization]
    first, last = tuple(range(num_inputs)), tuple(range(x.ndim - num_inputs, x.ndim))
    dimensions = ((last, first), ((), ()))
    operands = _quantize(x, last, dtype), _quantize(weight, first, dtype)
    product = qwix.dot_general(*operands, dimensions, preferred_element_type=jnp.float32)
    # Policies that save matmuls save this: the output of the matmul itself has 32 bits.
    return checkpoint_name(product.astype(out_dtype), PRODUCT)


def input_gradient(cotangent: jax.Array, weight: jax.Array, num_inputs: int, quantization: str) -> jax.Array:
    """Gradient of `project` by x: cotangent [..., *outputs] times the dequantized weight -> [..., *inputs].

    The weight is the quantized one of the forward pass. Its scales belong to the outputs, over which this product sums,
    so they multiply the cotangent. This product is then quantized, each row with a scale.
    """
    import qwix

    dtype, gradient_dtype = _TYPES[quantization]
    quantized = _quantize(weight, tuple(range(num_inputs)), dtype)
    scaled = cotangent * quantized.scale.reshape(weight.shape[num_inputs:])
    last = tuple(range(cotangent.ndim - weight.ndim + num_inputs, cotangent.ndim))
    dimensions = ((last, tuple(range(num_inputs, weight.ndim))), ((), ()))
    gradient = qwix.dot_general(
        _quantize(scaled, last, gradient_dtype), quantized.qvalue, dimensions, preferred_element_type=jnp.float32
    )
    return gradient.astype(cotangent.dtype)


def _quantize(x: jax.Array, contracted: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """A `qwix.QArray` with one scale for all `contracted` dimensions, and float32 scales along the others.

    A sharded weight is quantized before it is gathered, since the partitioner moves the smaller array.
    """
    import qwix

    kept = [dim for dim in range(x.ndim) if dim not in contracted]
    calibration = _CALIBRATION.get(dtype, "absmax")
    return qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=kept, calibration_method=calibration)
