"""Low-rank adapters of linear layers: LoRA (Hu et al., 2021, arXiv 2106.09685) and DoRA (Liu et al., 2024, 2402.09353).

A linear layer x W + b becomes x W + (alpha / rank) (x A) B + b. W is frozen; A and B are trained, and B starts at zero.
DoRA multiplies x W + (alpha / rank) (x A) B by m / |W + (alpha / rank) A B|, with one trained magnitude m and one norm
over the inputs for each output. The norm gets no gradient (section 4.3 of its paper).
"""

import dataclasses
import math
from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax import patterns
from llmjax.errors import UserError
from llmjax.nn import quantized
from llmjax.nn.linear import Linear, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of linear layers. With them, all other parameters are frozen, except those of optimizer.trainable.

    rank       inner size of an adapter; 0: no adapters
    alpha      an adapter's output is multiplied by alpha / rank
    layers     patterns of the linear layers that get one, such as ("blocks.attention", "*.up"); ("*",): all
    dora       also train the magnitude of each output (DoRA)
    int8_base  store the weights of these layers in 8 bits, with a scale for each output; they are dequantized on use
    """

    rank: int = 0
    alpha: float = 16.0
    layers: tuple[str, ...] = ("*",)
    dora: bool = False
    int8_base: bool = False

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"model.lora.rank={self.rank}: must be 1 or more, or 0 for no adapters")
        if not self.alpha > 0:
            raise UserError(f"model.lora.alpha={self.alpha}: must be above 0")
        if not self.layers:
            raise UserError("model.lora.layers=(): name at least one linear layer, or set model.lora.rank=0")
        for field in ("dora", "int8_base"):
            if getattr(self, field) and not self.rank:
                raise UserError(f"model.lora.{field}=true: there are no adapters; set model.lora.rank")


class Adapter(nnx.Module):
    """The parameters of one adapter: a [*inputs, rank], b [rank, *outputs], and for DoRA magnitude [*outputs]."""

    def __init__(self, a: nnx.Param, b: nnx.Param, magnitude: nnx.Param | None, scale: float):
        self.a, self.b, self.magnitude, self.scale = a, b, magnitude, scale

    def __call__(self, x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
        """The output y [..., *outputs] of the frozen `weight` for x [..., *inputs], with the adapter's part."""
        num_inputs = self.a[...].ndim - 1
        with quantized.use("none"):  # both matmuls are small, and the gradient of b is that of the task
            y = y + self.scale * project(project(x, self.a[...], num_inputs), self.b[...])
        return y if self.magnitude is None else y * self._gain(self._sum(weight)).astype(y.dtype)

    def merge(self, weight: jax.Array) -> jax.Array:
        """The weight [*inputs, *outputs] of the linear layer that computes the same without an adapter, in float32."""
        total = self._sum(weight)
        return total if self.magnitude is None else total * self._gain(total)

    def _sum(self, weight: jax.Array) -> jax.Array:
        a, b = self.a[...].astype(jnp.float32), self.b[...].astype(jnp.float32)
        return weight.astype(jnp.float32) + self.scale * jnp.tensordot(a, b, 1)

    def _gain(self, total: jax.Array) -> jax.Array:
        """Magnitude over norm, [*outputs]."""
        assert self.magnitude is not None
        return self.magnitude[...].astype(jnp.float32) / jax.lax.stop_gradient(norm(total, self.a[...].ndim - 1))


def norm(weight: jax.Array, num_inputs: int) -> jax.Array:
    """The norm over the inputs of weight [*inputs, *outputs] -> [*outputs], in float32."""
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=tuple(range(num_inputs))))


def add_adapters(model: nnx.Module, config: LoraConfig, key: jax.Array) -> None:
    """Give the linear layers that the config selects an adapter, in place.

    Layers of a stack have parameters with a leading "layers" dimension, and so do their adapters. Raises UserError for
    a pattern that matches no linear layer.
    """
    if not config.rank:
        return
    linears = linear_layers(model)
    _check_patterns(model, config, linears)
    for name, linear in linears.items():
        if patterns.matches(name, config.layers):
            _add_adapter(linear, config, jax.random.fold_in(key, zlib.crc32(name.encode())))


def linear_layers(model: nnx.Module) -> dict[str, Linear]:
    """The linear layers of a model by dotted name."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, Linear)}


def _check_patterns(model: nnx.Module, config: LoraConfig, linears: dict[str, Linear]) -> None:
    others = (".".join(map(str, path)) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param))
    for other in others:
        inside = next((pattern for pattern in config.layers if patterns.matches(other, [pattern])), None)
        if inside is not None and not any(patterns.matches(name, [inside]) for name in linears):
            raise UserError(
                f"model.lora.layers: {inside!r} selects {other}, which is not of a linear layer; adapters fit linear "
                f"layers alone: {', '.join(linears)}"
            )
    patterns.check("model.lora.layers", config.layers, linears, "linear layer")


def _add_adapter(linear: Linear, config: LoraConfig, key: jax.Array) -> None:
    weight = linear.weight[...]
    names = linear.weight.get_metadata()["out_sharding"]
    lead = weight.ndim - len(names)  # stacked layers
    stack, inputs, outputs = _split(weight.shape, lead, linear.num_inputs)
    in_names, out_names = names[: linear.num_inputs], names[linear.num_inputs :]
    # The variance of the uniform distribution with which PEFT starts.
    std = (3 * math.prod(inputs)) ** -0.5
    a = std * jax.random.normal(key, (*stack, *inputs, config.rank), jnp.float32)
    if config.int8_base:
        weight = _quantize_base(linear, lead)
    magnitude = None
    if config.dora:
        of_stack = lambda weight: norm(weight, linear.num_inputs)
        for _ in range(lead):
            of_stack = jax.vmap(of_stack)
        magnitude = nnx.Param(of_stack(weight), out_sharding=out_names)
    linear.adapter = Adapter(
        nnx.Param(a, out_sharding=(*in_names, "rank")),
        nnx.Param(jnp.zeros((*stack, config.rank, *outputs), jnp.float32), out_sharding=("rank", *out_names)),
        magnitude,
        config.alpha / config.rank,
    )


def _split(shape: tuple[int, ...], lead: int, num_inputs: int) -> tuple[Any, Any, Any]:
    return shape[:lead], shape[lead : lead + num_inputs], shape[lead + num_inputs :]


def _quantize_base(linear: Linear, lead: int) -> jax.Array:
    """Store a weight in 8 bits: codes from -127 to 127 and a float32 scale for each output. Returns what it stands for.

    Rounding to the nearest code changes no entry by more than half a scale.
    """
    weight, names = linear.weight[...].astype(jnp.float32), linear.weight.get_metadata()["out_sharding"]
    inputs = tuple(range(lead, lead + linear.num_inputs))
    largest = jnp.max(jnp.abs(weight), axis=inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 127
    codes = jnp.round(weight / scale).astype(jnp.int8)
    linear.weight = nnx.Param(codes, out_sharding=names)
    linear.weight_scale = nnx.Param(jnp.squeeze(scale, inputs), out_sharding=names[linear.num_inputs :])
    return codes * scale


def merge_adapters(model: nnx.Module) -> None:
    """Merge the adapters of a model, and scales of weights of 8 bits, into its weights, which become float32."""
    for linear in linear_layers(model).values():
        if linear.adapter is None and linear.weight_scale is None:
            continue
        names = linear.weight.get_metadata()["out_sharding"]
        of_stack = lambda layer: layer.merged_weight(jnp.float32)
        for _ in range(linear.weight[...].ndim - len(names)):
            of_stack = jax.vmap(of_stack)
        weight = of_stack(linear)
        linear.weight, linear.adapter, linear.weight_scale = nnx.Param(weight, out_sharding=names), None, None
