"""Safetensors files: parts of tensors read from disk as they are asked for, and files written one tensor at a time.

The format is a length, a JSON header and the tensors' bytes. It is read here rather than by the library of that name,
which knows no float8 in numpy and writes a file from one dict of whole tensors.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.config import UserError

TYPES: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_LONGEST_HEADER = 100_000_000
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return TYPES[self.dtype].itemsize * math.prod(self.shape)

    def read(self, box: tuple[slice, ...] | None = None) -> np.ndarray:
        """The part `box` (None: all), copied out of the file; no more of it than that stays in memory."""
        if not self.nbytes:
            whole = np.zeros(self.shape, TYPES[self.dtype])
        else:
            whole = np.memmap(self.path, TYPES[self.dtype], "r", self.offset, self.shape or (1,)).reshape(self.shape)
        return np.array(whole if box is None else whole[box])


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises UserError where it is no safetensors file, or cut short."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        entries = {
            name: Entry(path, item["dtype"], tuple(item["shape"]), 8 + length + item["data_offsets"][0])
            for name, item in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); fetch it again") from None
    for name, entry in entries.items():
        if entry.dtype not in TYPES:
            raise UserError(f"{path}: tensor {name} is of type {entry.dtype}; known are {', '.join(TYPES)}")
        if entry.offset + entry.nbytes > size:
            raise UserError(f"{path}: the file ends before tensor {name} does; fetch it again")
    return entries


def read_folder(folder: Path) -> dict[str, Entry]:
    """All tensors of model.safetensors, else of the shards that model.safetensors.index.json names.

    A whole file goes before an index, which an earlier version of the checkpoint may have left. A tensor that the index
    names and no shard holds is absent from the result: it may be a tied head, which only the architecture knows.
    Raises UserError where neither file is there, or a shard is missing.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise UserError(f"{folder}: neither model.safetensors nor {_INDEX} there; other formats are not read")
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(named.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: no weight_map there ({error}); fetch it again") from None
    found: dict[str, Entry] = {}
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise UserError(f"{folder}: the shard {shard} that {_INDEX} names is missing; fetch it")
        found |= {name: entry for name, entry in read_header(folder / shard).items() if named.get(name) == shard}
    return found


def nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor of a type such as "F32" and a shape."""
    return TYPES[spec[0]].itemsize * math.prod(spec[1])


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into files of at most `limit` bytes; a tensor that is larger has a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_folder(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    make: Callable[[str], np.ndarray],
    *,
    limit: int,
    wrote: Callable[[int], None] = lambda nbytes: None,
    primary: bool = True,
) -> list[Path]:
    """Write `make(name)` for each name of `tensors` (name -> type such as "F32", shape) as one file or several.

    No more than one tensor is held at a time. `make` is called for all of them in order, in a process that is not
    `primary` too, and only the primary one writes. `wrote` is told the bytes of each tensor. Returns the files.
    """
    sizes = {name: nbytes(spec) for name, spec in tensors.items()}
    shards = plan_shards(sizes, limit)
    paths = [folder / _shard_name(number, len(shards)) for number in range(len(shards))]
    for path, names in zip(paths, shards, strict=True):
        parts = (_checked(name, make(name), *tensors[name]) for name in names)
        if primary:
            _write_file(path, {name: tensors[name] for name in names}, _told(parts, wrote))
        else:
            for _ in parts:
                pass
    if primary and len(shards) > 1:
        named = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        (folder / _INDEX).write_text(json.dumps({"metadata": total, "weight_map": named}, indent=2) + "\n")
    return paths


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _checked(name: str, array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    assert _NAMES[array.dtype] == dtype and array.shape == shape, (name, array.dtype, array.shape, dtype, shape)
    return array


def _told(parts: Iterable[np.ndarray], wrote: Callable[[int], None]) -> Iterable[np.ndarray]:
    for part in parts:
        yield part
        wrote(part.nbytes)


def _write_file(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], parts: Iterable[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + nbytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            np.ascontiguousarray(part).reshape(-1).view(np.uint8).tofile(file)
        file.flush()
        os.fsync(file.fileno())
