"""Model families by name: from a config to a module, shapes, logical axes and initial parameters."""

import dataclasses
import math
import typing
from typing import Any

from flax import nnx
import jax

from llmjax.batch import Graph, Params
from llmjax.models.decoder import Decoder
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDec, EncDecConfig
from llmjax.models.encoder import Encoder, EncoderConfig
from llmjax.models.moe import MoeConfig, MoeDecoder
from llmjax.models.recurrent import Recurrent, RecurrentConfig
from llmjax.nn import lora
from llmjax.nn.lora import LoraConfig

# Family -> module. ModelConfig lists the config classes, of which `model.family` selects one.
FAMILIES: dict[str, Any] = {
    "decoder": Decoder,
    "moe": MoeDecoder,
    "encoder": Encoder,
    "encdec": EncDec,
    "recurrent": Recurrent,
}
ModelConfig = DecoderConfig | MoeConfig | EncoderConfig | EncDecConfig | RecurrentConfig


def config_class(family: str) -> Any:
    """The config class of a family."""
    options: tuple[Any, ...] = typing.get_args(ModelConfig)
    return next(option for option in options if option.family == family)


def build(config: ModelConfig, key: jax.Array) -> nnx.Module:
    """The model of a config, with fresh parameters. Those of a model without adapters do not depend on adapters."""
    model = FAMILIES[config.family](config, key)
    lora.add_adapters(model, config.lora, _adapter_key(key))
    return model


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The config of the model without adapters."""
    return dataclasses.replace(config, lora=LoraConfig())


def add_adapters(config: ModelConfig, params: Params, key: jax.Array) -> Params:
    """Parameters of `config`, from those of `without_adapters(config)`; the new ones are those that `init` draws."""
    model = nnx.merge(abstract(without_adapters(config))[0], params)
    lora.add_adapters(model, config.lora, _adapter_key(key))
    return nnx.to_pure_dict(nnx.state(model))


def merge_adapters(config: ModelConfig, params: Params) -> Params:
    """Parameters of `without_adapters(config)` that compute what those of `config` do; merged weights are float32."""
    model = nnx.merge(abstract(config)[0], params)
    lora.merge_adapters(model)
    return nnx.to_pure_dict(nnx.state(model))


def _adapter_key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, 1 << 20)


def abstract(config: ModelConfig) -> tuple[Graph, Params, Params]:
    """(graph, shapes, axes) without computing anything: `nnx.merge(graph, params)` is the model.

    shapes   a ShapeDtypeStruct for each parameter
    axes     a tuple of logical axes for each parameter; stacked ones have "layers" as their first axis
    """
    graph, state = nnx.split(jax.eval_shape(lambda: build(config, jax.random.key(0))))
    shapes = nnx.to_pure_dict(state)
    is_param = lambda node: isinstance(node, nnx.Param)
    return graph, shapes, jax.tree.map(_axes, _as_dict(state), is_leaf=is_param)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters as a nested dict of arrays; the same numbers under jit on any mesh."""
    return nnx.to_pure_dict(nnx.state(build(config, key)))


def parameters_by_part(shapes: Params) -> dict[str, int]:
    """Number of parameters under each top-level name of the shapes of a model, padding of the vocabulary included."""
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, embedding and its padding included; nothing is allocated."""
    return sum(parameters_by_part(abstract(config)[1]).values())


def _axes(param: nnx.Param) -> tuple[str, ...]:
    axes = param.get_metadata()["out_sharding"]
    return ("layers",) * (len(param.shape) - len(axes)) + tuple(axes)


def _as_dict(state: Any) -> Any:
    return {name: _as_dict(node) for name, node in state.items()} if isinstance(state, nnx.State) else state
