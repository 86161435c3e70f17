"""Names, layouts and shapes of another project's tensors, declared once as rules and applied in both directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint.fingerprint import leaf_name
from llmjax.errors import UserError
from llmjax.interop import windows
from llmjax.models import registry
from llmjax.models.registry import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor on disk, or one for each layer and expert, and the parameters that it becomes.

    theirs   name on disk. {layer} in it takes the leading "layers" dimension of ours, {expert} the next one
    ours     dotted names of our parameters
    take     tensor -> one array for each name in ours, without the dimensions taken: transposes, reshapes and cuts
    give     those arrays -> the tensor, to the last bit
    copies   further names under which the same tensor may, or may not, lie on disk again (tied heads). One of all its
             names must be there; where several are, they must be equal
    layers   the number that stands for {layer}, for each of our layers; None there: on disk that layer has no such
             tensor, and ours is `fill`. None: 0, 1, 2, ...
    """

    theirs: str
    ours: tuple[str, ...]
    take: Callable[[Any], tuple[Any, ...]] = lambda tensor: (tensor,)
    give: Callable[..., Any] = lambda array: array
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

    names: tuple[str, ...]
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


class Correspondence:
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
                for position, name in enumerate(rule.ours):
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

    def theirs_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a tensor on disk."""
        return self._theirs_shape(tensor.rule, len(tensor.at))

    @functools.cache  # noqa: B019  (lives as long as its few rules)
    def _theirs_shape(self, rule: Rule, taken: int) -> tuple[int, ...]:
        parts = [windows.reserved(self.used_shape(name)[taken:]) for name in rule.ours]
        return tuple(rule.give(*parts).shape)

    def check(self, source: Source) -> None:
        """UserError for the first tensor that is missing, superfluous or of a shape that does not fit."""
        found = source.shapes()
        for tensor in self.tensors:
            there = [name for name in tensor.names if name in found]
            if not there:
                raise UserError(
                    f"tensor {tensor.names[0]} is missing; expected shape {list(self.theirs_shape(tensor))}"
                )
            for name in there:
                if found[name] != self.theirs_shape(tensor):
                    raise UserError(
                        f"tensor {name} has shape {list(found[name])}; expected {list(self.theirs_shape(tensor))}"
                    )
        known = {name for tensor in self.tensors for name in tensor.names}
        for name, shape in found.items():
            if name not in known:
                raise UserError(f"tensor {name} of shape {list(shape)} has no place in this model")

    def check_copies(self, source: Source, rows: int = 1 << 12) -> None:
        """UserError where a tensor lies on disk twice and the two differ (a head that is not tied after all)."""
        found = source.shapes()
        for tensor in self.tensors:
            first, *others = [name for name in tensor.names if name in found]
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
            there = next(n for n in tensor.names if n in found)
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
        for name in tensor.rule.ours:
            cut = tuple(slice(0, size) for size in self.used_shape(name)[len(tensor.at) :])
            arrays.append(np.asarray(part(name, tensor.at))[cut])
        return np.ascontiguousarray(tensor.rule.give(*arrays)).reshape(self.theirs_shape(tensor))

    def _expand(self, rule: Rule) -> Iterator[Tensor]:
        for name in rule.ours:
            assert name in self.shapes, f"rule {rule.theirs}: no parameter {name!r}; there are {list(self.shapes)}"
        fields = [field for field in ("layer", "expert") if f"{{{field}}}" in rule.theirs]
        sizes = {self.shapes[name].shape[: len(fields)] for name in rule.ours}
        assert len(sizes) == 1, f"rule {rule.theirs}: layers or experts of {rule.ours} differ"
        for at in itertools.product(*(range(size) for size in sizes.pop())):
            numbers: dict[str, int | None] = dict(zip(fields, at, strict=True))
            if rule.layers is not None:
                numbers["layer"] = rule.layers[at[0]]
            if None not in numbers.values():
                yield Tensor(tuple(name.format(**numbers) for name in (rule.theirs, *rule.copies)), rule, at)

    def _check_rules(self) -> None:
        for name, owners in self._owners.items():
            assert owners, f"no rule makes parameter {name!r}"
            places = [tensor.at for tensor, _ in owners]
            assert len(set(places)) == len(places), f"several rules make parameter {name!r}"
        names = [name for tensor in self.tensors for name in tensor.names]
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
    table, source = Correspondence(rules, config), InMemory(tensors)
    table.check(source)
    table.check_copies(source)
    everything = {name: tuple(slice(0, size) for size in leaf.shape) for name, leaf in table.shapes.items()}
    return table.tree({name: jnp.asarray(table.read(name, index, source)) for name, index in everything.items()})


def dump(rules: Iterable[Rule], params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The state dict of parameters, as torch's state_dict() names it: copies included."""
    table = Correspondence(rules, config)
    flat = {name: np.asarray(array) for name, array in table.flat(params).items()}
    found = {}
    for tensor in table.tensors:
        array = table.write(tensor, lambda name, at: flat[name][at])
        found |= dict.fromkeys(tensor.names, array)
    return found


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {leaf_name(path): leaf for path, leaf in leaves}


@functools.lru_cache(maxsize=1024)
def _window(take: Callable, shape: tuple[int, ...], position: int, index: tuple) -> windows.Window:
    return windows.find(take, shape, position, tuple(slice(*part) for part in index))


def _read_part(
    rule: Rule, shape: tuple[int, ...], position: int, index: tuple[slice, ...], read: Callable
) -> np.ndarray:
    window = _window(rule.take, shape, position, tuple((part.start, part.stop) for part in index))
    tensor = read(window.box)
    return rule.take(tensor)[position][index] if window.whole else window.view(tensor)
