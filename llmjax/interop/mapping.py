"""Mappings between tensors of Hugging Face and parameters here, declared once and applied in both directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
import mmap
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint.fingerprint import leaf_name
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.registry import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor on disk, or one for each layer and expert, and the parameters that it becomes.

    hf_name  name on disk. {layer} in it stands for the leading "layers" dimension of the parameters, {expert} for the
             next one
    names    dotted names of the parameters
    from_hf  tensor -> one array for each name, without those leading dimensions: transposes, reshapes and slices
    to_hf    those arrays -> the tensor, bit by bit
    copies   further names under which the same tensor may, or may not, lie on disk again (tied heads). One of all its
             names must be there; where several are, they must be equal
    layers   the number that stands for {layer}, for each of our layers; None there: on disk that layer has no such
             tensor, and ours is `fill`. None: 0, 1, 2, ...
    """

    hf_name: str
    names: tuple[str, ...]
    from_hf: Callable[[Any], tuple[Any, ...]] = lambda tensor: (tensor,)
    to_hf: Callable[..., Any] = lambda array: array
    copies: tuple[str, ...] = ()
    layers: Sequence[int | None] | None = None
    fill: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class name in config.json's "architectures".

    read_config    config.json -> fields of the config's section `model`; raises UserError by name for what cannot be
                   honoured
    write_config   config of the model -> config.json without "architectures"; may raise UserError. What it cannot
                   express need not be refused there: the result is read back and compared
    rules          config of the model -> all its rules
    rename         a tensor's name in published files -> the name that the rules know; None: not read (buffers, heads
                   of a task that is not continued)
    free           fields of the model that change nothing in models of this class, such as the rotary base of one with
                   learned positions
    """

    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    write_config: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], list[Rule]]
    rename: Callable[[str], str | None] = lambda name: name
    free: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor on disk: its names, the first of which is the one that is written, its rule, and the layer and the
    expert of ours that it holds, as far as the rule has them."""

    hf_names: tuple[str, ...]
    rule: Rule
    at: tuple[int, ...]


class Source(Protocol):
    """Tensors by name, read in parts."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all there are."""
        ...

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """The part `box` of a tensor."""
        ...


class InMemory:
    """A Source over a dict of numpy arrays."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self._tensors[name])[box]


class ParamMapping:
    """Every tensor on disk and every parameter of one model, tied to each other by rules.

    `shapes` and `axes` are those of our parameters by dotted name; `tensors` what lies on disk, in the rules' order.
    """

    def __init__(self, rules: Iterable[Rule], config: ModelConfig):
        _, shapes, axes = registry.abstract(config)
        self.shapes: dict[str, jax.ShapeDtypeStruct] = _flat(shapes)
        self.axes: dict[str, tuple[str, ...]] = _flat(axes)
        self._tree, self._vocab = jax.tree.structure(shapes), config.vocab_size
        self.tensors: list[Tensor] = []
        self._owners: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in self.shapes}
        for rule in rules:
            for tensor in self._expand(rule):
                self.tensors.append(tensor)
                for position, name in enumerate(rule.names):
                    self._owners[name].append((tensor, position))
        self._check_rules()

    def tree(self, parameters: Mapping[str, Any]) -> dict:
        """The nested dict of parameters by dotted name."""
        return jax.tree.unflatten(self._tree, [parameters[name] for name in self.shapes])

    def flat(self, params: dict) -> dict[str, Any]:
        """Parameters by dotted name."""
        return _flat(params)

    def used_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter without the padding of its vocabulary: what lies on disk."""
        sizes = zip(self.shapes[name].shape, self.axes[name], strict=True)
        return tuple(self._vocab if axis == "vocab" else size for size, axis in sizes)

    def count(self) -> int:
        """Number of parameters, padding left out."""
        return sum(math.prod(self.used_shape(name)) for name in self.shapes)

    def hf_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a tensor on disk."""
        return self._hf_shape(tensor.rule, len(tensor.at))

    @functools.cache  # noqa: B019  (lives as long as its few rules)
    def _hf_shape(self, rule: Rule, taken: int) -> tuple[int, ...]:
        parts = [_reserved(self.used_shape(name)[taken:]) for name in rule.names]
        return tuple(rule.to_hf(*parts).shape)

    def check(self, source: Source) -> None:
        """UserError for the first tensor that is missing, superfluous or of a shape that does not fit."""
        found = source.shapes()
        for tensor in self.tensors:
            there = [name for name in tensor.hf_names if name in found]
            if not there:
                raise UserError(f"tensor {tensor.hf_names[0]} is missing; expected shape {list(self.hf_shape(tensor))}")
            for name in there:
                if found[name] != self.hf_shape(tensor):
                    raise UserError(
                        f"tensor {name} has shape {list(found[name])}; expected {list(self.hf_shape(tensor))}"
                    )
        known = {name for tensor in self.tensors for name in tensor.hf_names}
        for name, shape in found.items():
            if name not in known:
                raise UserError(f"tensor {name} of shape {list(shape)} has no place in this model")

    def check_copies(self, source: Source, rows: int = 1 << 12) -> None:
        """UserError where a tensor lies on disk twice and the two differ (a head that is not tied after all)."""
        found = source.shapes()
        for tensor in self.tensors:
            first, *others = [name for name in tensor.hf_names if name in found]
            for name in others:
                for start in range(0, (found[first] or (1,))[0], rows):
                    box = (slice(start, start + rows),) if found[first] else ()
                    box += tuple(slice(0, size) for size in found[first][1:])
                    if not np.array_equal(source.read(first, box), source.read(name, box), equal_nan=False):
                        raise UserError(
                            f"tensor {name} differs from {first}; expected an equal copy, as config.json ties them"
                        )

    def read(self, name: str, index: tuple[slice, ...], source: Source) -> np.ndarray:
        """The part `index` of one of our parameters, in its own type, from those parts of tensors that hold it."""
        shape, used = self.shapes[name].shape, self.used_shape(name)
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        out = np.zeros([part.stop - part.start for part in index], self.shapes[name].dtype)
        found = source.shapes()
        for tensor, position in self._owners[name]:
            taken = len(tensor.at)
            if not all(part.start <= i < part.stop for i, part in zip(tensor.at, index, strict=False)):
                continue
            inner = tuple(
                slice(part.start, min(part.stop, size)) for part, size in zip(index[taken:], used[taken:], strict=True)
            )
            if any(part.start >= part.stop for part in inner):  # padding alone
                continue
            there = next(n for n in tensor.hf_names if n in found)
            place = tuple(i - part.start for i, part in zip(tensor.at, index, strict=False))
            place += tuple(slice(0, part.stop - part.start) for part in inner)
            out[place] = _read_part(
                tensor.rule, found[there], position, inner, lambda box, n=there: source.read(n, box)
            )
        self._fill(name, index, out)
        return out

    def write(self, tensor: Tensor, part: Callable[[str, tuple[int, ...]], np.ndarray]) -> np.ndarray:
        """A tensor as it lies on disk; `part(name, at)` is our parameter at a layer and an expert, padding and all."""
        arrays = []
        for name in tensor.rule.names:
            cut = tuple(slice(0, size) for size in self.used_shape(name)[len(tensor.at) :])
            arrays.append(np.asarray(part(name, tensor.at))[cut])
        return np.ascontiguousarray(tensor.rule.to_hf(*arrays)).reshape(self.hf_shape(tensor))

    def _expand(self, rule: Rule) -> Iterator[Tensor]:
        for name in rule.names:
            assert name in self.shapes, f"rule {rule.hf_name}: no parameter {name!r}; there are {list(self.shapes)}"
        fields = [field for field in ("layer", "expert") if f"{{{field}}}" in rule.hf_name]
        sizes = {self.shapes[name].shape[: len(fields)] for name in rule.names}
        assert len(sizes) == 1, f"rule {rule.hf_name}: layers or experts of {rule.names} differ"
        for at in itertools.product(*(range(size) for size in sizes.pop())):
            numbers: dict[str, int | None] = dict(zip(fields, at, strict=True))
            if rule.layers is not None:
                numbers["layer"] = rule.layers[at[0]]
            if None not in numbers.values():
                yield Tensor(tuple(name.format(**numbers) for name in (rule.hf_name, *rule.copies)), rule, at)

    def _check_rules(self) -> None:
        for name, owners in self._owners.items():
            assert owners, f"no rule makes parameter {name!r}"
            places = [tensor.at for tensor, _ in owners]
            assert len(set(places)) == len(places), f"several rules make parameter {name!r}"
        names = [name for tensor in self.tensors for name in tensor.hf_names]
        assert len(set(names)) == len(names), "two rules make one tensor"

    def _fill(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Layers without a tensor on disk."""
        for rule in {id(tensor.rule): tensor.rule for tensor, _ in self._owners[name]}.values():
            for layer, number in enumerate(rule.layers or ()):
                if number is None and index[0].start <= layer < index[0].stop:
                    out[layer - index[0].start] = rule.fill


def load(rules: Iterable[Rule], tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict:
    """Parameters from a state dict of numpy arrays, with the vocabulary's padding at zero. UserError where they do not
    fit each other."""
    table, source = ParamMapping(rules, config), InMemory(tensors)
    table.check(source)
    table.check_copies(source)
    everything = {name: tuple(slice(0, size) for size in leaf.shape) for name, leaf in table.shapes.items()}
    return table.tree({name: jnp.asarray(table.read(name, index, source)) for name, index in everything.items()})


def dump(rules: Iterable[Rule], params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The state dict of parameters, as torch's state_dict() names it: copies included."""
    table = ParamMapping(rules, config)
    flat = {name: np.asarray(array) for name, array in table.flat(params).items()}
    found = {}
    for tensor in table.tensors:
        array = table.write(tensor, lambda name, at: flat[name][at])
        found |= dict.fromkeys(tensor.hf_names, array)
    return found


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {leaf_name(path): leaf for path, leaf in leaves}


# Pairs of `from_hf` and `to_hf` for rules, as keywords of a Rule.


def matrix(inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """torch's Linear: [product of outputs, product of inputs] on disk, [*inputs, *outputs] here."""
    out = len(outputs)
    forward = (*range(out, out + len(inputs)), *range(out))
    back = (*range(len(inputs), len(inputs) + out), *range(len(inputs)))
    return {
        "from_hf": lambda tensor: (tensor.reshape(*outputs, *inputs).transpose(forward),),
        "to_hf": lambda array: array.transpose(back).reshape(math.prod(outputs), math.prod(inputs)),
    }


def straight(inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """GPT-2's Conv1D: [product of inputs, product of outputs] on disk, [*inputs, *outputs] here."""
    return {
        "from_hf": lambda tensor: (tensor.reshape(*inputs, *outputs),),
        "to_hf": lambda array: array.reshape(math.prod(inputs), math.prod(outputs)),
    }


def vector(outputs: Sequence[int]) -> dict[str, Any]:
    """A bias: [product of outputs] on disk, [*outputs] here."""
    return {
        "from_hf": lambda tensor: (tensor.reshape(*outputs),),
        "to_hf": lambda array: array.reshape(math.prod(outputs)),
    }


def transposed() -> dict[str, Any]:
    """A plain matrix the other way round, such as an untied head: [vocab, embed] on disk, [embed, vocab] here."""
    return {"from_hf": lambda tensor: (tensor.T,), "to_hf": lambda array: array.T}


# Which part of a tensor on disk a part of a parameter needs, from the strides of a view before any byte is read.


@dataclasses.dataclass(frozen=True)
class Window:
    """The box of a tensor that holds a wanted part, and where the part lies inside that box.

    box       a slice for each dimension of the tensor on disk
    steps     for each dimension of the part: (dimension of the tensor, step along it)
    shape     of the part
    whole     the layout is no view of the tensor (it merges dimensions that do not lie together): read it all, then
              lay it out and cut it
    """

    box: tuple[slice, ...]
    steps: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    whole: bool = False

    def view(self, read: np.ndarray) -> np.ndarray:
        """The wanted part of `read`, the content of the box; nothing is copied."""
        read = np.ascontiguousarray(read)
        strides = [step * read.strides[dimension] for dimension, step in self.steps]
        return np.lib.stride_tricks.as_strided(read, self.shape, strides, writeable=False)


def find_window(
    from_hf: Callable[[Any], tuple[Any, ...]], shape: tuple[int, ...], position: int, index: tuple[slice, ...]
) -> Window:
    """The window of `from_hf(tensor)[position][index]`, for a tensor of `shape`.

    `from_hf` is tried on a tensor that is reserved and never touched, so this costs no memory where it makes views.
    """
    nothing = _reserved(shape)
    part = from_hf(nothing)[position][index]
    everything = Window(tuple(slice(0, size) for size in shape), (), part.shape, whole=True)
    if part.size == 0 or not np.may_share_memory(part, nothing):
        return everything
    offset = part.__array_interface__["data"][0] - nothing.__array_interface__["data"][0]
    start = [int(coordinate) for coordinate in np.unravel_index(offset, shape)] if shape else []
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    stop, steps = [coordinate + 1 for coordinate in start], []
    for size, stride in zip(part.shape, part.strides, strict=True):
        if size == 1:
            steps.append((0, 0))
            continue
        fits = [d for d in range(len(shape)) if shape[d] > 1 and 0 < strides[d] <= stride]
        if not fits or stride % strides[fits[0]]:
            return everything
        steps.append((fits[0], stride // strides[fits[0]]))
        stop[fits[0]] += (size - 1) * steps[-1][1]
    if any(end > size for end, size in zip(stop, shape, strict=True)):  # a dimension that runs over a row's end
        return everything
    return Window(tuple(slice(a, b) for a, b in zip(start, stop, strict=True)), tuple(steps), part.shape)


def _reserved(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, uint8, that take addresses but no memory, however many: the system accounts for no read-only pages."""
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    return np.frombuffer(pages, np.uint8)[:size].reshape(shape)


@functools.lru_cache(maxsize=1024)
def _window(from_hf: Callable, shape: tuple[int, ...], position: int, index: tuple) -> Window:
    return find_window(from_hf, shape, position, tuple(slice(*part) for part in index))


def _read_part(
    rule: Rule, shape: tuple[int, ...], position: int, index: tuple[slice, ...], read: Callable
) -> np.ndarray:
    window = _window(rule.from_hf, shape, position, tuple((part.start, part.stop) for part in index))
    tensor = read(window.box)
    return rule.from_hf(tensor)[position][index] if window.whole else window.view(tensor)
