"""Read a GGUF file as if it were a Hugging Face folder: config.json, tensors dequantized one at a time, a tokenizer."""

from collections.abc import Collection
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.binding import bind
from llmjax.errors import UserError, suggest
from llmjax.interop import gguf_models, gguf_tokenizers
from llmjax.interop.gguf_models import ROPE_FACTORS, Form
from llmjax.interop.hf_checkpoint import ARCHITECTURES, FAMILIES, Checkpoint
from llmjax.interop.mapping import ParamMapping, Slices
from llmjax.models import registry


def require_gguf() -> Any:
    """The package gguf. UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: run `pip install 'llmjax[gguf]'`") from None
    return gguf


def tensor_name_map(architecture: str, blocks: int) -> Any:
    """gguf.TensorNameMap of general.architecture, for a number of layers."""
    gguf = require_gguf()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(arch, blocks)


class GgufFile:
    """The metadata of a GGUF file, and its tensors.

    metadata   by key; floats are the shortest that give the stored float32
    tensors    gguf.ReaderTensor by name; their data are mapped, not read
    """

    def __init__(self, path: Path):
        self.gguf = require_gguf()
        try:
            reader = self.gguf.GGUFReader(path)
            self.metadata = {key: _shorten(field.contents()) for key, field in reader.fields.items()}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"{path}: not a GGUF file that can be read ({error}); fetch it again") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if (parts := self.metadata.get("split.count", 1)) > 1:
            raise UserError(f"{path}: one of {parts} parts; join them with `llama-gguf-split --merge`")
        self._check_types(path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, the last dimension being contiguous, as in NumPy."""
        return {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in self.tensors.items()}

    def dequantize(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or one entry of its first dimension, as float32."""
        tensor = self.tensors[name]
        data = tensor.data if index is None else tensor.data[index]
        return self.gguf.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)

    def _check_types(self, path: Path) -> None:
        """UserError for a type that the package cannot dequantize."""
        for kind in {tensor.tensor_type for tensor in self.tensors.values()}:
            _, nbytes = self.gguf.GGML_QUANT_SIZES[kind]
            try:
                self.gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
            except NotImplementedError:
                name = next(name for name, tensor in self.tensors.items() if tensor.tensor_type == kind)
                raise UserError(
                    f"{path}: tensor {name} is stored as {kind.name}, which cannot be dequantized; convert the file to "
                    "another type, such as Q8_0"
                ) from None


class GgufTensors:
    """A Source over a GGUF file, under the names of transformers. One tensor at a time is held dequantized.

    stored   name -> (name in the file, its entry of the first dimension or None, form)
    unused   names in the file that nothing needs
    """

    def __init__(self, file: GgufFile, stored: dict[str, tuple[str, int | None, Form]], unused: Collection[str] = ()):
        self._file, self._stored = file, stored
        shapes = file.shapes()
        used = {stored_name for stored_name, _, _ in stored.values()} | set(unused)
        self._shapes = {name: shape for name, shape in shapes.items() if name not in used}
        for name, (stored_name, index, form) in stored.items():
            shape = shapes[stored_name] if index is None else shapes[stored_name][1:]
            self._shapes[name] = shape[::-1] if form.transposed else shape
        self._last: tuple[str, np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return sum(int(tensor.n_bytes) for tensor in self._file.tensors.values())

    @property
    def types(self) -> list[str]:
        """The types on disk."""
        return sorted({tensor.tensor_type.name for tensor in self._file.tensors.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name; a tensor that the class does not have keeps its name in the file."""
        return self._shapes

    def read(self, name: str, box: Slices) -> np.ndarray:
        """The part `box` of a tensor, float32."""
        if self._last is None or self._last[0] != name:  # parts of a tensor are read in a row
            stored_name, index, form = self._stored[name]
            self._last = name, form.restore(self._file.dequantize(stored_name, index))
        return self._last[1][box]


def read(path: Path, folder: Path, ignore: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in a GGUF file; the files of its tokenizer are written into `folder`.

    ignore   unknown metadata that are accepted, without the architecture's name
    Raises UserError for an unknown architecture, type or tokenizer, and for metadata that are not supported.
    """
    file = GgufFile(path)
    name = str(file.metadata.get("general.architecture"))
    if name not in gguf_models.ARCHITECTURES:
        known = ", ".join(gguf_models.ARCHITECTURES)
        raise UserError(
            f"{path}: general.architecture={name!r}{suggest(name, gguf_models.ARCHITECTURES)} is not supported; "
            f"supported are {known}"
        )
    try:
        return _read(file, name, path, folder, ignore)
    except UserError as error:
        message = str(error).replace("config.json", "the metadata").replace(f"{folder}/", "")
        raise UserError(f"{path}: {message}") from None


def _read(file: GgufFile, name: str, path: Path, folder: Path, ignore: Collection[str]) -> Checkpoint:
    factors = file.dequantize(ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    hf = gguf_models.read_config(name, file.metadata, file.shapes(), factors)
    hf |= gguf_tokenizers.write_files(file.metadata, folder)
    (class_name,) = hf["architectures"]
    architecture = ARCHITECTURES[class_name]
    family = next(family for family, classes in FAMILIES.items() if class_name in classes)
    checkpoint = Checkpoint(path, hf, class_name, family, architecture, GgufTensors(file, {}), tokenizer_folder=folder)
    model = bind(registry.config_class(family), checkpoint.read_model(ignore), "model")
    name_map = tensor_name_map(name, file.metadata.get(f"{name}.block_count", 0))
    stored: dict[str, tuple[str, int | None, Form]] = {}
    for tensor in ParamMapping(architecture.rules(model), model, architecture.missing).tensors:
        place = gguf_models.name_tensor(name_map, tensor, architecture.publish)
        if place is not None and place[0] in file.tensors:
            stored[tensor.hf_names[0]] = (*place, gguf_models.ARCHITECTURES[name].form(place[0], hf))
    unused = [ROPE_FACTORS] if factors is not None else []
    return dataclasses.replace(checkpoint, tensors=GgufTensors(file, stored, unused))


def _shorten(value: Any) -> Any:
    """A value of the metadata; a float becomes the shortest one that gives the same float32, such as 1e-5."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
