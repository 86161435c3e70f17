"""A published checkpoint on disk: architecture, config.json and tensors, dequantized as they are read."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from llmjax.binding import bind
from llmjax.errors import UserError, suggest
from llmjax.interop import decoder, encdec, encoder, files, moe
from llmjax.interop.hf_config import UnknownFieldError, format_value
from llmjax.interop.mapping import Architecture, Slices, Source
from llmjax.models import registry

# Family -> its classes. If several classes express a model, the first one is exported.
FAMILIES: dict[str, dict[str, Architecture]] = {
    "decoder": decoder.ARCHITECTURES,
    "moe": moe.ARCHITECTURES,
    "encoder": encoder.ARCHITECTURES,
    "encdec": encdec.ARCHITECTURES,
}
ARCHITECTURES = {name: architecture for classes in FAMILIES.values() for name, architecture in classes.items()}

# Class names in files of the first releases.
OLD_NAMES = {"T5WithLMHeadModel": "T5ForConditionalGeneration", "LLaMAForCausalLM": "LlamaForCausalLM"}

_PLAIN_TYPES = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A local folder, or a GGUF file.

    hf                  its config.json, or what stands for it
    name, architecture  the class in config.json
    family              the llmjax family
    left_out            tensors of heads that llmjax does not have
    tokenizer_folder    the folder with the files of the tokenizer; None: `folder`
    """

    folder: Path
    hf: dict[str, Any]
    name: str
    family: str
    architecture: Architecture
    tensors: "StoredTensors"
    left_out: list[str] = dataclasses.field(default_factory=list)
    tokenizer_folder: Path | None = None

    def read_model(self, ignore: Collection[str] = ()) -> dict[str, Any]:
        """The config's section `model` from config.json, accepting the unknown fields named in `ignore`.

        Raises UserError for a field that is not supported, for an unknown one that is not in `ignore`, for a name in
        `ignore` that is no unknown field, and for sizes that need more numbers than the files hold.
        """
        hf, not_ignored_yet = self.hf, list(dict.fromkeys(ignore))
        while True:
            try:
                section = {"family": self.family, **self.architecture.read_config(hf)}
                stored = self.tensors.shapes()
                section |= {field: True for field, name in self.architecture.shown_by.items() if name in stored}
                model = bind(registry.config_class(self.family), section, "model")  # before the user's overrides
                break
            except UnknownFieldError as error:
                if error.name not in not_ignored_yet:
                    raise
                not_ignored_yet.remove(error.name)
                hf = _remove_field(hf, error.name)
            except UserError as error:
                if str(error).startswith("config.json"):
                    raise
                raise UserError(f"config.json: {error}") from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise UserError(f"config.json: a field has a value of a wrong type ({error})") from None
        if not_ignored_yet:
            name = format_value(not_ignored_yet[0], quote=False)
            raise UserError(f"--ignore={name}: config.json has no unknown field of this name; remove the flag")
        self._check_size(model)
        return section

    def _check_size(self, model: Any) -> None:
        """UserError for sizes that need far more memory than the files do, before rules are expanded for every layer.

        If only a few tensors are missing, `ParamMapping.check_tensors` names the first one.
        """
        try:
            _, shapes, _ = registry.abstract(dataclasses.replace(model, scan=True, vocab_multiple=1))
            needed = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        except (ArithmeticError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"config.json: its sizes give no valid model ({reason}); fetch the folder again") from None
        stored = sum(math.prod(shape) for shape in self.tensors.shapes().values())
        # A class may lack a head and, as T5EncoderModel, a decoder that is larger than the encoder.
        if needed > (4 if self.architecture.missing else 2) * stored + (1 << 20):
            text = self.hf.get("text_config", self.hf)
            numbers = {name: value for name, value in text.items() if type(value) is int and value > 1}
            sizes = ", ".join(f"{name}={value}" for name, value in numbers.items() if not name.endswith("_id"))
            raise UserError(
                f"config.json: its sizes ({sizes}) give {needed} parameters and the files hold {stored} numbers; "
                "fetch the folder again"
            )


class StoredTensors(Source, Protocol):
    """A Source that knows how its tensors are stored."""

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        ...

    @property
    def types(self) -> list[str]:
        """The types on disk."""
        ...


class Tensors:
    """A Source over the files of a folder, under the names that the rules know; quantized tensors are dequantized."""

    def __init__(self, entries: dict[str, files.Entry], quantization: "Quantization | None" = None):
        self._entries, self._quantization = entries, quantization
        shapes = {name: entry.shape for name, entry in entries.items()}
        self._shapes = shapes if quantization is None else quantization.shapes(shapes)
        self._last_dequantized: tuple[str, np.ndarray] | None = None
        for name in self._shapes:
            self._check_types(name)

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def types(self) -> list[str]:
        """The types on disk."""
        return sorted({entry.dtype for entry in self._entries.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name, after dequantization."""
        return self._shapes

    def _check_types(self, name: str) -> None:
        parts = {} if self._quantization is None else self._quantization.parts(name)
        missing = [part for part in parts if part not in self._entries]
        without = ""
        if not parts or missing:
            parts = {name: _PLAIN_TYPES}
            without = f" without {' and '.join(missing)}" if missing else ""
        for part, types in parts.items():
            if self._entries[part].dtype not in types:
                raise UserError(
                    f"tensor {part} is stored as {self._entries[part].dtype}{without}; supported are {', '.join(types)}"
                )

    def read(self, name: str, box: Slices) -> np.ndarray:
        """The part `box` of a tensor."""
        if self._quantization is None:
            return self._entries[name].read(box)
        if self._last_dequantized is None or self._last_dequantized[0] != name:  # parts of a tensor are read in a row
            tensor = self._quantization.dequantize(name, lambda part: self._entries[part].read())
            if tensor is None:
                return self._entries[name].read(box)
            self._last_dequantized = name, tensor
        return self._last_dequantized[1][box]


def read(folder: Path) -> Checkpoint:
    """Read config.json and the tensor headers of a folder. UserError for an unknown architecture or quantization."""
    hf = files.read_json(folder / "config.json")
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"config.json: architectures={format_value(names)}: expected a list of one name")
    names = [str(OLD_NAMES.get(name, name)) for name in names]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        listed = format_value(", ".join(names), quote=False) or "none"
        hint = suggest(names[0], ARCHITECTURES) if names else ""
        known = ", ".join(name for name, architecture in ARCHITECTURES.items() if not architecture.base)
        raise UserError(
            f"{folder}: architecture {listed}{hint} is not known; known are {known}, and the same without a head "
            "(such as LlamaModel) and for classification (such as LlamaForSequenceClassification)"
        )
    architecture = ARCHITECTURES[names[0]]
    entries: dict[str, files.Entry] = {}
    left_out: list[str] = []
    for name, entry in files.read_folder(folder).items():
        if name.startswith(architecture.left_out):
            left_out.append(name)
            continue
        renamed = architecture.rename(name)
        if renamed in entries:
            raise UserError(f"{folder}: two tensors are both {renamed}, one of them as {name}")
        if renamed is not None:
            entries[renamed] = entry
    family = next(family for family, classes in FAMILIES.items() if names[0] in classes)
    return Checkpoint(folder, hf, names[0], family, architecture, Tensors(entries, _read_quantization(hf)), left_out)


def _remove_field(hf: dict[str, Any], path: str) -> dict[str, Any]:
    """config.json without the field of a dotted path, which may lie in text_config."""
    if path in hf:
        return {name: value for name, value in hf.items() if name != path}
    head, _, rest = path.partition(".")
    head, rest = (head, rest) if isinstance(hf.get(head), dict) else ("text_config", path)
    return {**hf, head: _remove_field(hf[head], rest)}


def _read_quantization(hf: dict[str, Any]) -> "Quantization | None":
    settings = hf.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise UserError(
            f"config.json: quantization_config={format_value(settings)}: expected a section with quant_method"
        )
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in QUANTIZATIONS:
        raise UserError(
            f"config.json: quantization_config.quant_method={format_value(method)} is not supported; supported are "
            f"{', '.join(QUANTIZATIONS)}"
        )
    return QUANTIZATIONS[method](settings)


Shapes = dict[str, tuple[int, ...]]
GetTensor = Callable[[str], np.ndarray]


# The values of a 4-bit float: a sign, two bits of exponent and one of mantissa (Open Compute Project, 2023,
# Microscaling formats 1.0, E2M1).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)  # low half first


class Mxfp4:
    """gpt-oss: X_blocks uint8 [experts, outputs, blocks, 16] and X_scales uint8 [experts, outputs, blocks].

    Each byte holds two weights. Each block of 32 weights has one power of two, with 127 added to its exponent. They
    stand for X [experts, inputs, outputs].
    """

    def __init__(self, settings: Mapping[str, Any]):
        del settings  # the names of packed tensors tell them apart

    def shapes(self, stored: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Names and shapes of the dequantized tensors, from those that are stored."""
        shapes: Shapes = {}
        for name, shape in stored.items():
            stem = name.rpartition("_")[0]
            if name.endswith("_scales") and f"{stem}_blocks" in stored:
                continue
            if not name.endswith("_blocks"):
                shapes[name] = shape
                continue
            if len(shape) < 3 or stored.get(f"{stem}_scales") != shape[:-1]:
                raise UserError(f"tensor {stem}_scales is missing or not of shape {list(shape[:-1])}")
            *leading, outputs, blocks, size = shape
            shapes[stem] = (*leading, blocks * size * 2, outputs)
        return shapes

    def parts(self, name: str) -> dict[str, tuple[str, ...]]:
        """The stored tensors that X is packed into, and the types that each may have."""
        return {f"{name}_blocks": ("U8",), f"{name}_scales": ("U8",)}

    def dequantize(self, name: str, get: GetTensor) -> np.ndarray | None:
        """float32 [experts, inputs, outputs], or None for a tensor that is not packed."""
        try:
            blocks = get(f"{name}_blocks")
        except KeyError:
            return None
        scales = get(f"{name}_scales").astype(np.int32) - 127
        values = np.ldexp(_PAIRS[blocks].reshape(*scales.shape, -1), scales[..., None])
        return values.reshape(*scales.shape[:-1], -1).swapaxes(-1, -2)


class Fp8Blocks:
    """DeepSeek-V3: weights X [outputs, inputs] in 8-bit floats, and X_scale_inv, a factor for each block of them."""

    def __init__(self, settings: Mapping[str, Any]):
        block = settings.get("weight_block_size")
        if not isinstance(block, list | tuple) or [type(size) is int and size > 0 for size in block] != [True, True]:
            raise UserError(
                f"config.json: quantization_config.weight_block_size={block!r} is not supported, only two numbers "
                "such as [128, 128]"
            )
        self.block = tuple(block)

    def shapes(self, stored: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Names and shapes of the dequantized tensors, from those that are stored."""
        shapes: Shapes = {}
        for name, shape in stored.items():
            if name.endswith("_scale_inv"):
                weight = stored.get(name.removesuffix("_scale_inv"))
                tiles = weight and tuple(-(-size // step) for size, step in zip(weight, self.block, strict=False))
                if tiles != shape or len(shape) != len(self.block):
                    raise UserError(f"tensor {name} has shape {list(shape)}; its weight needs {tiles and list(tiles)}")
            else:
                shapes[name] = shape
        return shapes

    def parts(self, name: str) -> dict[str, tuple[str, ...]]:
        """The stored tensors that X is packed into, and the types that each may have."""
        return {name: ("F8_E4M3",), f"{name}_scale_inv": ("F32", "BF16", "F16", "F8_E8M0")}

    def dequantize(self, name: str, get: GetTensor) -> np.ndarray | None:
        """float32 [outputs, inputs], or None for a tensor without factors."""
        try:
            factors = get(f"{name}_scale_inv")
        except KeyError:
            return None
        weight = get(name).astype(np.float32)
        for dim, step in enumerate(self.block):
            factors = np.repeat(factors, step, axis=dim).take(range(weight.shape[dim]), axis=dim)
        return weight * factors.astype(np.float32)


Quantization = Mxfp4 | Fp8Blocks
# quant_method -> its class, which takes quantization_config.
QUANTIZATIONS: dict[str, Callable[[dict[str, Any]], Quantization]] = {"mxfp4": Mxfp4, "fp8": Fp8Blocks}
