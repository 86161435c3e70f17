"""A published checkpoint on disk: architecture, config.json, and tensors, dequantised where needed."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmjax.binding import bind
from llmjax.errors import UserError, suggest
from llmjax.interop import decoder, encdec, encoder, files, moe
from llmjax.interop.hf_config import UnknownField, shown
from llmjax.interop.mapping import Architecture
from llmjax.models import registry

# One line a family. Where several classes express a model, the first is the one that is exported.
FAMILIES: dict[str, dict[str, Architecture]] = {
    "decoder": decoder.ARCHITECTURES,
    "moe": moe.ARCHITECTURES,
    "encoder": encoder.ARCHITECTURES,
    "encdec": encdec.ARCHITECTURES,
}
ARCHITECTURES = {name: found for family in FAMILIES.values() for name, found in family.items()}

# Names that files of the first releases have for a class.
OLD_NAMES = {"T5WithLMHeadModel": "T5ForConditionalGeneration", "LLaMAForCausalLM": "LlamaForCausalLM"}

_READ = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A local folder: its config.json, the name, our family and the mapping of its architecture, its tensors."""

    folder: Path
    hf: dict[str, Any]
    name: str
    family: str
    architecture: Architecture
    tensors: "Tensors"

    def read_model(self, ignore: Collection[str] = ()) -> dict[str, Any]:
        """The config's section `model` from config.json, accepting the unknown fields named in `ignore`.

        Raises UserError for a field that cannot be honoured, for one that is unknown and not in `ignore`, for a name in
        `ignore` that is no unknown field, and for sizes that need more numbers than the files hold.
        """
        hf, unused = self.hf, list(dict.fromkeys(ignore))
        while True:
            try:
                section = {"family": self.family, **self.architecture.read_config(hf)}
                model = bind(registry.config_class(self.family), section, "model")  # before the user's overrides
                break
            except UnknownField as error:
                if error.name not in unused:
                    raise
                unused.remove(error.name)
                hf = _without(hf, error.name)
            except UserError as error:
                if str(error).startswith("config.json"):
                    raise
                raise UserError(f"config.json: {error}") from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise UserError(f"config.json: a field has a value of a wrong type ({error})") from None
        if unused:
            name = shown(unused[0], quote=False)
            raise UserError(f"--ignore={name}: config.json has no unknown field of this name; remove the flag")
        self._check_size(model)
        return section

    def _check_size(self, model: Any) -> None:
        """Refuse sizes that need far more memory than the files do, before rules are expanded for every layer. Where a
        few tensors are missing, `ParamMapping.check` names the first."""
        try:
            _, shapes, _ = registry.abstract(dataclasses.replace(model, scan=True, vocab_multiple=1))
            needed = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        except (ArithmeticError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"config.json: its sizes make no model ({reason})") from None
        stored = sum(math.prod(shape) for shape in self.tensors.shapes().values())
        if needed > 2 * stored + (1 << 20):
            text = self.hf.get("text_config", self.hf)
            numbers = {name: value for name, value in text.items() if type(value) is int and value > 1}
            sizes = ", ".join(f"{name}={value}" for name, value in numbers.items() if not name.endswith("_id"))
            raise UserError(
                f"config.json: its sizes ({sizes}) make {needed} parameters and the files hold {stored} numbers; "
                "fetch the folder again"
            )


class Tensors:
    """A Source over the files of a folder: standard names, quantised tensors unpacked as they are read."""

    def __init__(self, entries: dict[str, files.Entry], unpack: Any = None):
        self._entries, self._unpack = entries, unpack
        shapes = {name: entry.shape for name, entry in entries.items()}
        self._shapes = shapes if unpack is None else unpack.shapes(shapes)
        self._last: tuple[str, np.ndarray] | None = None
        for name in self._shapes:
            self._check_types(name)

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def types(self) -> list[str]:
        """The types on disk."""
        return sorted({entry.dtype for entry in self._entries.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def _check_types(self, name: str) -> None:
        parts = {} if self._unpack is None else self._unpack.parts(name)
        missing = [part for part in parts if part not in self._entries]
        without = ""
        if not parts or missing:
            parts = {name: _READ}
            without = f" without {' and '.join(missing)}" if missing else ""
        for part, types in parts.items():
            if self._entries[part].dtype not in types:
                raise UserError(
                    f"tensor {part} is stored as {self._entries[part].dtype}{without}; read are {', '.join(types)}"
                )

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        if self._unpack is None:
            return self._entries[name].read(box)
        if self._last is None or self._last[0] != name:  # parts of one tensor are asked for one after the other
            found = self._unpack.dequantise(name, lambda n: self._entries[n].read())
            if found is None:
                return self._entries[name].read(box)
            self._last = name, found
        return self._last[1][box]


def read(folder: Path) -> Checkpoint:
    """Look at a folder; no tensor is read. Raises UserError for an architecture or a quantisation that is not known."""
    hf = files.read_json(folder / "config.json")
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"config.json: architectures={shown(names)}: expected a list of one name")
    names = [str(OLD_NAMES.get(name, name)) for name in names]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        given = shown(", ".join(names), quote=False) or "none"
        near = suggest(names[0], ARCHITECTURES) if names else ""
        raise UserError(f"{folder}: architecture {given}{near} is not known; known are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[names[0]]
    entries: dict[str, files.Entry] = {}
    for name, entry in files.read_folder(folder).items():
        standard = architecture.rename(name)
        if standard in entries:
            raise UserError(f"{folder}: two tensors are both {standard}, one of them as {name}")
        if standard is not None:
            entries[standard] = entry
    family = next(family for family, known in FAMILIES.items() if names[0] in known)
    return Checkpoint(folder, hf, names[0], family, architecture, Tensors(entries, _quantisation(hf)))


def _without(hf: dict[str, Any], path: str) -> dict[str, Any]:
    """config.json without the field of a dotted path, which may lie in text_config."""
    if path in hf:
        return {name: value for name, value in hf.items() if name != path}
    head, _, rest = path.partition(".")
    head, rest = (head, rest) if isinstance(hf.get(head), dict) else ("text_config", path)
    return {**hf, head: _without(hf[head], rest)}


def _quantisation(hf: dict[str, Any]) -> Any:
    given = hf.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise UserError(f"config.json: quantization_config={shown(given)}: expected a section with quant_method")
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in QUANTISATIONS:
        known = ", ".join(QUANTISATIONS)
        raise UserError(
            f"config.json: quantization_config.quant_method={shown(method)} cannot be unpacked; known: {known}"
        )
    make: Callable[[dict[str, Any]], Any] = QUANTISATIONS[method]
    return make(given)


# Quantised checkpoints: what their packed tensors stand for, in float32. Each class is made from quantization_config.
# `shapes` turns the shapes on disk into those of the unpacked tensors; `parts` names what one of them is packed into,
# with the types that each may have on disk; `dequantise` gives one, or None where it lies on disk as it is.
Shapes = dict[str, tuple[int, ...]]
GetTensor = Callable[[str], np.ndarray]

# The values of 4 bits: a sign, two bits of exponent and one of mantissa (Open Compute Project, 2023, Microscaling
# formats 1.0, E2M1).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)  # low half first


class Mxfp4:
    """gpt-oss: X_blocks uint8 [experts, outputs, blocks, 16] and X_scales uint8 [experts, outputs, blocks].

    Each byte holds two weights, each block of 32 has one power of two, with 127 added to its exponent. The tensor that
    is meant is X [experts, inputs, outputs].
    """

    def __init__(self, settings: Mapping[str, Any]):
        del settings  # what is packed is seen by its name

    def shapes(self, disk: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Names and shapes of the tensors that are meant."""
        found: Shapes = {}
        for name, shape in disk.items():
            if name.endswith("_scales") and _stem(name) + "_blocks" in disk:
                continue
            if not name.endswith("_blocks"):
                found[name] = shape
                continue
            if len(shape) < 3 or disk.get(_stem(name) + "_scales") != shape[:-1]:
                raise UserError(f"tensor {_stem(name)}_scales is missing or not of shape {list(shape[:-1])}")
            *lead, outputs, blocks, size = shape
            found[_stem(name)] = (*lead, blocks * size * 2, outputs)
        return found

    def parts(self, name: str) -> dict[str, tuple[str, ...]]:
        """The two tensors that X is packed into, and their types."""
        return {f"{name}_blocks": ("U8",), f"{name}_scales": ("U8",)}

    def dequantise(self, name: str, get: GetTensor) -> np.ndarray | None:
        """float32 [experts, inputs, outputs], or None for a tensor that is not packed."""
        try:
            blocks = get(f"{name}_blocks")
        except KeyError:
            return None
        scales = get(f"{name}_scales").astype(np.int32) - 127
        values = np.ldexp(_PAIRS[blocks].reshape(*scales.shape, -1), scales[..., None])
        return values.reshape(*scales.shape[:-1], -1).swapaxes(-1, -2)


class Fp8Blocks:
    """DeepSeek-V3: weights X [outputs, inputs] in 8-bit floats, and in X_scale_inv a factor for each block of them."""

    def __init__(self, settings: Mapping[str, Any]):
        block = settings.get("weight_block_size")
        if not isinstance(block, list | tuple) or [type(size) is int and size > 0 for size in block] != [True, True]:
            raise UserError(
                f"config.json: quantization_config.weight_block_size={block!r} is not supported, only two numbers "
                "such as [128, 128]"
            )
        self.block = tuple(block)

    def shapes(self, disk: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Names and shapes of the tensors that are meant."""
        found: Shapes = {}
        for name, shape in disk.items():
            if name.endswith("_scale_inv"):
                weight = disk.get(name.removesuffix("_scale_inv"))
                tiles = weight and tuple(-(-size // step) for size, step in zip(weight, self.block, strict=False))
                if tiles != shape or len(shape) != len(self.block):
                    raise UserError(f"tensor {name} has shape {list(shape)}; its weight needs {tiles and list(tiles)}")
            else:
                found[name] = shape
        return found

    def parts(self, name: str) -> dict[str, tuple[str, ...]]:
        """X and its factors, and their types."""
        return {name: ("F8_E4M3",), f"{name}_scale_inv": ("F32", "BF16", "F16", "F8_E8M0")}

    def dequantise(self, name: str, get: GetTensor) -> np.ndarray | None:
        """float32 [outputs, inputs], or None for a tensor without factors."""
        try:
            factors = get(f"{name}_scale_inv")
        except KeyError:
            return None
        weight = get(name).astype(np.float32)
        for dim, step in enumerate(self.block):
            factors = np.repeat(factors, step, axis=dim).take(range(weight.shape[dim]), axis=dim)
        return weight * factors.astype(np.float32)


# quantization_config's quant_method -> what makes an unpacker of quantization_config.
QUANTISATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {"mxfp4": Mxfp4, "fp8": Fp8Blocks}


def _stem(name: str) -> str:
    return name.rpartition("_")[0]
