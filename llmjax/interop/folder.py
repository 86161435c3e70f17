"""A published checkpoint on disk: its config.json, and its tensors under the names that rules know."""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.config import UserError, suggest
from llmjax.interop import files
from llmjax.interop.architectures import ARCHITECTURES, FAMILIES, QUANTISATIONS
from llmjax.interop.mapping import Architecture

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


class Tensors:
    """A Source over the files of a folder: standard names, quantised tensors unpacked as they are read."""

    def __init__(self, entries: dict[str, files.Entry], unpack: Any = None):
        self._entries, self._unpack = entries, unpack
        shapes = {name: entry.shape for name, entry in entries.items()}
        self._shapes = shapes if unpack is None else unpack.shapes(shapes)
        self._last: tuple[str, np.ndarray] | None = None
        for name in self._shapes:
            lacking = [] if unpack is None else [part for part in unpack.beside(name) if part not in entries]
            packed = unpack is not None and not lacking
            if not packed and entries[name].dtype not in _READ:
                without = f" without {' and '.join(lacking)}" if lacking else ""
                raise UserError(
                    f"tensor {name} is stored as {entries[name].dtype}{without}; read are {', '.join(_READ)}"
                )

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
    hf = read_json(folder / "config.json")
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"config.json: architectures={names!r}: expected a list of one name")
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        given = ", ".join(names) or "none"
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


def _quantisation(hf: dict[str, Any]) -> Any:
    given = hf.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise UserError(f"config.json: quantization_config={given!r}: expected a section with quant_method")
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in QUANTISATIONS:
        known = ", ".join(QUANTISATIONS) or "none"
        raise UserError(f"config.json: quantization_config.quant_method={method!r} cannot be unpacked; known: {known}")
    make: Callable[[dict[str, Any]], Any] = QUANTISATIONS[method]
    return make(given)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a checkpoint with config.json") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return found
