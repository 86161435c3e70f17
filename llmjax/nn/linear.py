"""Linear map between named dimensions."""

from collections.abc import Mapping
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.nn import quantized, weights
from llmjax.nn.materialize import materialize
from llmjax.parallel import axes


def project(
    x: jax.Array, weight: jax.Array, num_inputs: int = 1, out_dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """x [..., *inputs] times weight [*inputs, *outputs] -> [..., *outputs], in `out_dtype` (None: the type of x).

    The weight is cast to the type of x; its gradient is computed in `axes.gradient_dtype`, by default in the type of x.
    Inside `quantized.use`, the product and the gradient by x have operands of 8 bits; the weight's gradient has not,
    because a scale would be shared by all tokens, whose gradients differ in size.
    """
    return _project(x, weight, num_inputs, out_dtype, quantized.current())  # type: ignore[return-value]


def _product(x, weight, num_inputs, out_dtype, quantization):
    if quantization != "none":
        return quantized.project(x, weight, num_inputs, out_dtype or x.dtype, quantization)
    first, last = tuple(range(num_inputs)), tuple(range(x.ndim - num_inputs, x.ndim))
    dimensions = ((last, first), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), dimensions, preferred_element_type=out_dtype)


_project = jax.custom_vjp(_product, nondiff_argnums=(2, 3, 4))


def _project_forward(x, weight, num_inputs, out_dtype, quantization):
    # Not _project: a remat policy that saves matmuls does not find those inside a function with a custom gradient.
    return _product(x, weight, num_inputs, out_dtype, quantization), (x, weight)


def _project_backward(num_inputs, out_dtype, quantization, saved, cotangent):
    x, weight = saved
    cotangent = cotangent.astype(x.dtype)
    if quantization == "none":
        ends = (tuple(range(x.ndim - num_inputs, cotangent.ndim)), tuple(range(num_inputs, weight.ndim)))
        dx = jax.lax.dot_general(cotangent, weight.astype(x.dtype), (ends, ((), ())))
    else:
        dx = quantized.input_gradient(cotangent, weight, num_inputs, quantization)
    return dx, _weight_gradient(x, cotangent, num_inputs).astype(weight.dtype)


def _weight_gradient(x, cotangent, num_inputs):
    # The weight's gradient is x^T dy; JAX's own rule computes (dy^T x)^T. On a CPU the transposed operand is copied: x
    # is in memory, but dy would be computed inside that copy with a stride. This saves 15% of a small decoder's step.
    # Where x is wider than dy, a copy of dy^T costs less.
    rows = tuple(range(x.ndim - num_inputs))
    # The partitioner adds the devices' products in the type of this matmul.
    dtype = axes.gradient_dtype(x.dtype)
    product = lambda a, b: jax.lax.dot_general(a, b, ((rows, rows), ((), ())), preferred_element_type=dtype)
    if math.prod(x.shape[len(rows) :]) <= math.prod(cotangent.shape[len(rows) :]):
        return product(x, cotangent)
    transposed, outputs = materialize(product(materialize(cotangent), x)), cotangent.ndim - len(rows)
    return transposed.transpose(*range(outputs, transposed.ndim), *range(outputs))


_project.defvjp(_project_forward, _project_backward)


class Linear(nnx.Module):
    """x [..., *inputs] -> [..., *outputs], with an optional bias.

    `inputs` and `outputs` map logical axes to sizes, such as {"embed": 512} and {"heads": 8, "head_dim": 64}. The
    weight starts normal with variance scale^2 / (number of inputs). Parameters are cast to the type of x.
    """

    def __init__(
        self,
        key: jax.Array,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        bias: bool,
        dtype: str,
        scale: float = 1.0,
    ):
        fan_in = math.prod(inputs.values())
        self.weight = weights.normal(key, {**inputs, **outputs}, std=scale * fan_in**-0.5, dtype=dtype)
        self.bias = weights.constant(0.0, outputs, dtype=dtype) if bias else None
        self.num_inputs = len(inputs)
        # Set by nn.lora: an adapter, and the scales [*outputs] of a frozen weight that is stored in 8 bits.
        self.adapter: Any = nnx.data(None)
        self.weight_scale: nnx.Param | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *inputs] -> [..., *outputs]."""
        weight = self.weight[...] if self.weight_scale is None else self._dequantize(x.dtype)
        y = project(x, weight, self.num_inputs)
        y = y if self.adapter is None else self.adapter(x, y, weight)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def merged_weight(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The weight [*inputs, *outputs] in `dtype` with the adapter merged into it: for layers that read weights."""
        if self.adapter is None:
            return self._dequantize(dtype)
        return self.adapter.merge(self._dequantize(jnp.float32)).astype(dtype)

    def _dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        weight = self.weight[...]
        if self.weight_scale is None:
            return weight.astype(dtype)
        return (weight.astype(jnp.float32) * self.weight_scale[...]).astype(dtype)
