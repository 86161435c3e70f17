"""Parameters from and to state dicts of numpy arrays, by the rules of an architecture."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from llmjax.batch import Params
from llmjax.interop.mapping import ParamMapping, Rule, Slices, flatten
from llmjax.models.registry import ModelConfig


class InMemory:
    """A Source over a dict of numpy arrays."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, box: Slices) -> np.ndarray:
        """The part `box` of a tensor."""
        return np.asarray(self._tensors[name])[box]


def load(rules: Iterable[Rule], tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Parameters from a state dict of numpy arrays, with the vocabulary's padding at 0.

    Raises UserError if names or shapes do not match, or if aliases differ.
    """
    table, source = ParamMapping(rules, config), InMemory(tensors)
    table.check_tensors(source)
    table.check_aliases(source)
    everything = {name: tuple(slice(0, size) for size in leaf.shape) for name, leaf in table.shapes.items()}
    return table.unflatten({name: jnp.asarray(table.read(name, part, source)) for name, part in everything.items()})


def dump(rules: Iterable[Rule], params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The state dict of parameters, as torch's state_dict() names it, aliases included."""
    table = ParamMapping(rules, config)
    parameters = {name: np.asarray(array) for name, array in flatten(params).items()}
    tensors: dict[str, np.ndarray] = {}
    for tensor in table.tensors:
        array = table.to_hf(tensor, lambda name, index: parameters[name][index])
        tensors |= dict.fromkeys(tensor.hf_names, array)
    return tensors
