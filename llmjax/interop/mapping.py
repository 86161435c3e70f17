"""Mappings between Hugging Face tensors and llmjax parameters, declared once and applied in both directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
import mmap
from typing import Any, Protocol

import jax
import numpy as np

from llmjax.batch import Params
from llmjax.checkpoint.fingerprint import leaf_name
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.registry import ModelConfig

Slices = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each dimension


@dataclasses.dataclass(frozen=True)
class Rule:
    """A Hugging Face tensor, or one for each layer and expert, and the parameters that it becomes.

    hf_name  name of the tensor. {layer} in it stands for the leading "layers" dimension of the parameters, {expert} for
             the next one
    names    dotted names of the parameters
    from_hf  tensor -> one array for each name, without those leading dimensions: transposes, reshapes and slices
    to_hf    those arrays -> the tensor, bit by bit
    aliases  further names under which the checkpoint may hold the same tensor (tied heads). It must hold one of all its
             names; if it holds several, they must be equal
    layers   the number that stands for {layer}, for each layer of the parameters; None there: the checkpoint has no
             such tensor for that layer, and the parameter is `default`. None: 0, 1, 2, ...
    """

    hf_name: str
    names: tuple[str, ...]
    from_hf: Callable[[Any], tuple[Any, ...]] = lambda tensor: (tensor,)
    to_hf: Callable[..., Any] = lambda array: array
    aliases: tuple[str, ...] = ()
    layers: Sequence[int | None] | None = None
    default: float = 0.0


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One class name in config.json's "architectures".

    read_config    config.json -> fields of the config's section `model`; raises UserError by name for a field that is
                   not supported
    write_config   config of the model -> config.json without "architectures"; may raise UserError. It need not refuse
                   what it cannot express: the result is read back and compared
    rules          config of the model -> all its rules
    rename         a tensor's name in published files -> the name that the rules know; None: not read (buffers, heads
                   of other tasks)
    unused_fields  fields of the model that change nothing in models of this class, such as the rotary base of one with
                   learned positions
    shown_by       fields of the model that config.json does not have -> the tensor whose presence sets them

    A class that differs from another one by its head alone (llmjax/interop/heads.py) has these, too:
    predicts_labels  whether its head is for labels of texts
    base           the class with the head that llmjax has; "": this one
    missing        prefixes of tensors, in the rules' names, that files of this class do not hold. An import initializes
                   their parameters, and an export does not write them
    left_out       prefixes of tensors, in published names, of heads that llmjax does not have
    exported_as    the class that an export writes for imported parameters; "": this one
    publish        a tensor's name in the rules -> its name in files of this class
    """

    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    write_config: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], list[Rule]]
    rename: Callable[[str], str | None] = lambda name: name
    unused_fields: tuple[str, ...] = ()
    shown_by: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: str = ""
    missing: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    exported_as: str = ""
    publish: Callable[[str], str] = lambda name: name
    predicts_labels: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor.

    hf_names  its names; the first one is written
    rule      where it comes from
    index     the layer and the expert of the parameters that it holds, if the rule has them
    """

    hf_names: tuple[str, ...]
    rule: Rule
    index: tuple[int, ...]


class Source(Protocol):
    """Tensors by name, read in parts."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        ...

    def read(self, name: str, box: Slices) -> np.ndarray:
        """The part `box` of a tensor."""
        ...


class ParamMapping:
    """Every Hugging Face tensor and every parameter of one model, connected by rules.

    shapes, axes  shape and logical axes of each parameter by dotted name
    tensors       the Hugging Face tensors, in the order of the rules

    Checkpoints may lack the tensors whose names begin with one of `missing`.
    """

    def __init__(self, rules: Iterable[Rule], config: ModelConfig, missing: tuple[str, ...] = ()):
        _, shapes, axes = registry.abstract(config)
        self.shapes: dict[str, jax.ShapeDtypeStruct] = flatten(shapes)
        self.axes: dict[str, tuple[str, ...]] = flatten(axes)
        self._tree, self._vocab, self._missing = jax.tree.structure(shapes), config.vocab_size, missing
        self.tensors: list[Tensor] = []
        # Parameter -> the tensors that it is made from, each with the parameter's position in the rule's names.
        self._tensors_of: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in self.shapes}
        for rule in rules:
            for tensor in self._expand(rule):
                self.tensors.append(tensor)
                for position, name in enumerate(rule.names):
                    self._tensors_of[name].append((tensor, position))
        self._check_rules()

    def unflatten(self, parameters: Mapping[str, Any]) -> Params:
        """The nested dict of parameters by dotted name."""
        return jax.tree.unflatten(self._tree, [parameters[name] for name in self.shapes])

    def unpadded_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter without the padding of its vocabulary, which checkpoints do not hold."""
        sizes = zip(self.shapes[name].shape, self.axes[name], strict=True)
        return tuple(self._vocab if axis == "vocab" else size for size, axis in sizes)

    def count(self) -> int:
        """Number of parameters without padding."""
        return sum(math.prod(self.unpadded_shape(name)) for name in self.shapes)

    def hf_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a Hugging Face tensor."""
        return self._hf_shape(tensor.rule, len(tensor.index))

    @functools.cache  # noqa: B019  (lives as long as its few rules)
    def _hf_shape(self, rule: Rule, num_leading: int) -> tuple[int, ...]:
        parts = [_reserve(self.unpadded_shape(name)[num_leading:]) for name in rule.names]
        return tuple(rule.to_hf(*parts).shape)

    def check_tensors(self, source: Source) -> None:
        """UserError for the first tensor that is missing, of another shape, or of no parameter."""
        shapes = source.shapes()
        for tensor in self.tensors:
            names = [name for name in tensor.hf_names if name in shapes]
            if not names and not self._may_be_missing(tensor):
                raise UserError(f"tensor {tensor.hf_names[0]} is missing; expected shape {list(self.hf_shape(tensor))}")
            for name in names:
                if shapes[name] != self.hf_shape(tensor):
                    raise UserError(
                        f"tensor {name} has shape {list(shapes[name])}; expected {list(self.hf_shape(tensor))}"
                    )
        known_names = {name for tensor in self.tensors for name in tensor.hf_names}
        for name, shape in shapes.items():
            if name not in known_names:
                raise UserError(f"tensor {name} of shape {list(shape)} belongs to no parameter of this model")

    def find_missing(self, source: Source) -> list[str]:
        """The parameters that a source has no tensors for, of those that it may lack."""
        shapes = source.shapes()
        is_absent = lambda tensor: self._may_be_missing(tensor) and not any(name in shapes for name in tensor.hf_names)
        return [
            name for name, made_from in self._tensors_of.items() if all(is_absent(tensor) for tensor, _ in made_from)
        ]

    def _may_be_missing(self, tensor: Tensor) -> bool:
        return tensor.hf_names[0].startswith(self._missing)

    def written_tensors(self) -> list[Tensor]:
        """The tensors that an export writes."""
        return [tensor for tensor in self.tensors if not self._may_be_missing(tensor)]

    def check_aliases(self, source: Source, rows: int = 1 << 12) -> None:
        """UserError if a source holds a tensor under several names and they differ (a head that is not tied).

        rows   rows compared at a time
        """
        shapes = source.shapes()
        for tensor in self.tensors:
            first, *others = [name for name in tensor.hf_names if name in shapes] or [""]
            for name in others:
                for start in range(0, (shapes[first] or (1,))[0], rows):
                    box = (slice(start, start + rows),) if shapes[first] else ()
                    box += tuple(slice(0, size) for size in shapes[first][1:])
                    if not np.array_equal(source.read(first, box), source.read(name, box), equal_nan=False):
                        raise UserError(
                            f"tensor {name} differs from {first}; expected an equal copy, as config.json ties them"
                        )

    def read(self, name: str, slices: Slices, source: Source) -> np.ndarray:
        """A part of a parameter, in the parameter's type; only the tensor parts that hold it are read."""
        shape, unpadded = self.shapes[name].shape, self.unpadded_shape(name)
        slices = tuple(slice(*part.indices(size)) for part, size in zip(slices, shape, strict=True))
        out = np.zeros([part.stop - part.start for part in slices], self.shapes[name].dtype)
        shapes = source.shapes()
        for tensor, position in self._tensors_of[name]:
            num_leading = len(tensor.index)
            if not all(part.start <= i < part.stop for i, part in zip(tensor.index, slices, strict=False)):
                continue
            sizes = zip(slices[num_leading:], unpadded[num_leading:], strict=True)
            inner = tuple(slice(part.start, min(part.stop, size)) for part, size in sizes)
            if any(part.start >= part.stop for part in inner):  # padding alone
                continue
            hf_name = next(n for n in tensor.hf_names if n in shapes)
            target = tuple(i - part.start for i, part in zip(tensor.index, slices, strict=False))
            target += tuple(slice(0, part.stop - part.start) for part in inner)
            out[target] = _read_part(source, hf_name, tensor.rule, shapes[hf_name], position, inner)
        self._fill_missing_layers(name, slices, out)
        return out

    def to_hf(self, tensor: Tensor, get_param: Callable[[str, tuple[int, ...]], np.ndarray]) -> np.ndarray:
        """A Hugging Face tensor; get_param(name, index) gives a parameter of a layer and an expert, with padding."""
        arrays = []
        for name in tensor.rule.names:
            unpadded = tuple(slice(0, size) for size in self.unpadded_shape(name)[len(tensor.index) :])
            arrays.append(np.asarray(get_param(name, tensor.index))[unpadded])
        return np.ascontiguousarray(tensor.rule.to_hf(*arrays)).reshape(self.hf_shape(tensor))

    def _expand(self, rule: Rule) -> Iterator[Tensor]:
        for name in rule.names:
            assert name in self.shapes, f"rule {rule.hf_name}: no parameter {name!r}; there are {list(self.shapes)}"
        fields = [field for field in ("layer", "expert") if f"{{{field}}}" in rule.hf_name]
        sizes = {self.shapes[name].shape[: len(fields)] for name in rule.names}
        assert len(sizes) == 1, f"rule {rule.hf_name}: layers or experts of {rule.names} differ"
        for index in itertools.product(*(range(size) for size in sizes.pop())):
            numbers: dict[str, int | None] = dict(zip(fields, index, strict=True))
            if rule.layers is not None:
                numbers["layer"] = rule.layers[index[0]]
            if None not in numbers.values():
                yield Tensor(tuple(name.format(**numbers) for name in (rule.hf_name, *rule.aliases)), rule, index)

    def _check_rules(self) -> None:
        for name, tensors in self._tensors_of.items():
            assert tensors, f"no rule makes parameter {name!r}"
            indices = [tensor.index for tensor, _ in tensors]
            assert len(set(indices)) == len(indices), f"several rules make parameter {name!r}"
        names = [name for tensor in self.tensors for name in tensor.hf_names]
        assert len(set(names)) == len(names), "two rules make one tensor"

    def _fill_missing_layers(self, name: str, slices: Slices, out: np.ndarray) -> None:
        """Write the default of the layers for which there is no tensor into `out`, the part `slices` of a parameter."""
        for rule in {id(tensor.rule): tensor.rule for tensor, _ in self._tensors_of[name]}.values():
            for layer, number in enumerate(rule.layers or ()):
                if number is None and slices[0].start <= layer < slices[0].stop:
                    out[layer - slices[0].start] = rule.default


def flatten(tree: Params) -> dict[str, Any]:
    """The leaves of a nested dict by dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {leaf_name(path): leaf for path, leaf in leaves}


# Pairs of `from_hf` and `to_hf`, as keywords of a Rule.


def linear(inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """torch's Linear: [product of outputs, product of inputs] <-> [*inputs, *outputs]."""
    out = len(outputs)
    forward = (*range(out, out + len(inputs)), *range(out))
    backward = (*range(len(inputs), len(inputs) + out), *range(len(inputs)))
    return {
        "from_hf": lambda tensor: (tensor.reshape(*outputs, *inputs).transpose(forward),),
        "to_hf": lambda array: array.transpose(backward).reshape(math.prod(outputs), math.prod(inputs)),
    }


def conv1d(inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """GPT-2's Conv1D: [product of inputs, product of outputs] <-> [*inputs, *outputs]."""
    return {
        "from_hf": lambda tensor: (tensor.reshape(*inputs, *outputs),),
        "to_hf": lambda array: array.reshape(math.prod(inputs), math.prod(outputs)),
    }


def vector(outputs: Sequence[int]) -> dict[str, Any]:
    """A bias: [product of outputs] <-> [*outputs]."""
    return {
        "from_hf": lambda tensor: (tensor.reshape(*outputs),),
        "to_hf": lambda array: array.reshape(math.prod(outputs)),
    }


def transposed() -> dict[str, Any]:
    """A plain matrix, such as an untied head: [vocab, embed] <-> [embed, vocab]."""
    return {"from_hf": lambda tensor: (tensor.T,), "to_hf": lambda array: array.T}


def make_linear_rules(hf_name: str, name: str, inputs: Sequence[int], outputs: Sequence[int], bias: bool) -> list[Rule]:
    """The weight of torch's Linear, and its bias if it has one."""
    rules = [Rule(f"{hf_name}.weight", (f"{name}.weight",), **linear(inputs, outputs))]
    return [*rules, Rule(f"{hf_name}.bias", (f"{name}.bias",), **vector(outputs))] if bias else rules


def make_norm_rules(names: Mapping[str, str], bias: bool = False) -> list[Rule]:
    """The scale of each norm, Hugging Face name -> name, and its bias if it has one."""
    rules = []
    for hf_name, name in names.items():
        rules.append(Rule(f"{hf_name}.weight", (f"{name}.scale",)))
        rules += [Rule(f"{hf_name}.bias", (f"{name}.bias",))] if bias else []
    return rules


# Which part of a tensor holds a part of a parameter: computed from the strides of a view, before any byte is read.


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """The smallest box of a tensor that holds a part of a parameter, and where the part lies inside that box.

    box       a slice for each dimension of the tensor
    steps     for each dimension of the part: (dimension of the tensor, step along it)
    shape     of the part
    reads_all the transform makes no view of the tensor (it merges dimensions that do not lie together): read the whole
              tensor, then transform and slice it
    """

    box: Slices
    steps: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    reads_all: bool = False

    def view(self, content: np.ndarray) -> np.ndarray:
        """The part inside `content`, which is the content of the box; nothing is copied."""
        content = np.ascontiguousarray(content)
        strides = [step * content.strides[dimension] for dimension, step in self.steps]
        return np.lib.stride_tricks.as_strided(content, self.shape, strides, writeable=False)


@functools.lru_cache(maxsize=1024)
def find_slice(
    from_hf: Callable[[Any], tuple[Any, ...]], shape: tuple[int, ...], position: int, bounds: Bounds
) -> TensorSlice:
    """Where the part `bounds` of `from_hf(tensor)[position]` lies in a tensor of `shape`.

    `from_hf` is applied to an array that is reserved and never touched, so views cost no memory.
    """
    reserved = _reserve(shape)
    part = from_hf(reserved)[position][tuple(slice(*pair) for pair in bounds)]
    everything = TensorSlice(tuple(slice(0, size) for size in shape), (), part.shape, reads_all=True)
    if part.size == 0 or not np.may_share_memory(part, reserved):
        return everything
    offset = part.__array_interface__["data"][0] - reserved.__array_interface__["data"][0]
    start = [int(coordinate) for coordinate in np.unravel_index(offset, shape)] if shape else []
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    stop, steps = [coordinate + 1 for coordinate in start], []
    for size, stride in zip(part.shape, part.strides, strict=True):
        if size == 1:
            steps.append((0, 0))
            continue
        candidates = [d for d in range(len(shape)) if shape[d] > 1 and 0 < strides[d] <= stride]
        if not candidates or stride % strides[candidates[0]]:
            return everything
        steps.append((candidates[0], stride // strides[candidates[0]]))
        stop[candidates[0]] += (size - 1) * steps[-1][1]
    if any(end > size for end, size in zip(stop, shape, strict=True)):  # a dimension that runs over a row's end
        return everything
    return TensorSlice(tuple(slice(a, b) for a, b in zip(start, stop, strict=True)), tuple(steps), part.shape)


def _reserve(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, uint8, that take addresses but no memory, however many: the system commits no read-only pages."""
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    return np.frombuffer(pages, np.uint8)[:size].reshape(shape)


def _read_part(
    source: Source, hf_name: str, rule: Rule, shape: tuple[int, ...], position: int, slices: Slices
) -> np.ndarray:
    """The part `slices` of the parameter at `position` in the names of a rule, for one layer and expert."""
    tensor_slice = find_slice(rule.from_hf, shape, position, tuple((part.start, part.stop) for part in slices))
    content = source.read(hf_name, tensor_slice.box)
    return rule.from_hf(content)[position][slices] if tensor_slice.reads_all else tensor_slice.view(content)
