"""Model families by name: from a config to a module, shapes, logical axes and initial parameters."""

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
    """The model of a config, with fresh parameters."""
    return FAMILIES[config.family](config, key)


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
