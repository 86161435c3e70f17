"""Read and write safetensors files tensor by tensor, and parts of tensors.

The format is a length, a JSON header and the tensors' bytes. It is read here rather than by the library of that name
(0.8), which has no float8 for numpy, reads parts at a third of this speed, takes the last of two tensors of one name,
and writes a file from one dict of whole tensors. The tests read every accepted file with it too.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from llmjax import atomic
from llmjax.errors import UserError
from llmjax.interop.hf_config import format_value

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
    """Where a tensor is stored."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return TYPES[self.dtype].itemsize * math.prod(self.shape)

    def read(self, box: tuple[slice, ...] | None = None) -> np.ndarray:
        """A copy of the part `box` (None: all); nothing else of the file stays in memory."""
        if not self.nbytes:
            tensor = np.zeros(self.shape, TYPES[self.dtype])
        else:
            tensor = np.memmap(self.path, TYPES[self.dtype], "r", self.offset, self.shape or (1,)).reshape(self.shape)
        return np.array(tensor if box is None else tensor[box])


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises UserError if it is no safetensors file, or if its tensors do not fill it: each must have as many bytes as its
    type and shape need, and they must follow each other without gaps or overlaps up to the end of the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise _not_safetensors(path, f"its header would have {length} bytes")
            content = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    header = parse_json(content, f"{path}: not a safetensors file: its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _not_safetensors(path, "__metadata__ is no map of strings")
    start, end = 8 + length, 0
    entries: dict[str, Entry] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, item in header.items():
        if not name.isprintable():
            raise _not_safetensors(path, f"a tensor is named {format_value(name)}")
        dtype, shape, (first, last) = _parse_entry(path, name, item)
        entries[name] = Entry(path, dtype, shape, start + first)
        if last - first != entries[name].nbytes:
            raise _not_safetensors(
                path, f"tensor {name} has {last - first} bytes; {dtype} {list(shape)} needs {entries[name].nbytes}"
            )
        if start + last > size:
            raise UserError(f"{path}: the file ends before tensor {name} does; fetch it again")
        ranges.append((first, last, name))
    for first, last, name in sorted(ranges):
        if first != end:
            what = "overlaps the tensor" if first < end else f"leaves a gap of {first - end} bytes to the data"
            raise _not_safetensors(path, f"tensor {name} {what} before it")
        end = last
    if start + end != size:
        raise _not_safetensors(path, f"{size - start - end} bytes follow its last tensor")
    return entries


def _parse_entry(path: Path, name: str, item: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """(type, shape, (first byte, byte after the last)) of one tensor in a header."""
    if not isinstance(item, dict):
        raise _not_safetensors(path, f"tensor {name} has no type, shape and data_offsets")
    dtype, shape, offsets = (item.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise UserError(
            f"{path}: tensor {name} is of type {format_value(dtype, quote=False)}; known are {', '.join(TYPES)}"
        )
    if not _is_sizes(shape):
        raise _not_safetensors(path, f"tensor {name}: shape={format_value(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise _not_safetensors(path, f"tensor {name}: data_offsets={format_value(offsets)}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _is_sizes(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)


def _not_safetensors(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a safetensors file ({reason}); fetch it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        size = path.stat().st_size
        if size > _LONGEST_HEADER:
            raise UserError(f"{path}: {size} bytes are too many for this file; fetch it again")
        return parse_json(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; give the folder of a checkpoint with config.json") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(content: bytes, where: str, *, unique_keys: bool = True) -> dict[str, Any]:
    """The object in `content`. Raises UserError for anything else, nesting too deep to parse, and a repeated key unless
    `unique_keys` is False.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_reject_repeated_keys if unique_keys else None)
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read (nested too deeply); fetch it again") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; fetch it again")
    return value


def _reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {format_value(next(name for name in names if names.count(name) > 1))} is repeated")
    return unique


def read_folder(folder: Path) -> dict[str, Entry]:
    """All tensors of model.safetensors, else of the shards that model.safetensors.index.json names.

    The single file takes precedence over an index, which may be left from an earlier version of the checkpoint. A
    tensor that the index names and no shard holds is absent from the result: it may be a tied head, which only the
    architecture knows. Raises UserError if neither file exists, or a shard is missing.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise UserError(f"{folder}: has neither model.safetensors nor {_INDEX}; other formats are not supported")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(
            f"{index}: weight_map={format_value(shard_of)}: expected a map from tensor to file; fetch it again"
        )
    entries: dict[str, Entry] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or "\0" in shard or not (folder / shard).is_file():
            name = format_value(shard, quote=False)
            raise UserError(f"{folder}: the shard {name} that {_INDEX} names is missing; fetch it")
        entries |= {name: entry for name, entry in read_header(folder / shard).items() if shard_of.get(name) == shard}
    return entries


def count_bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor of a type such as "F32" and a shape."""
    return TYPES[spec[0]].itemsize * math.prod(spec[1])


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, split into files of at most `limit` bytes; a larger tensor has a file of its own."""
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
    get_tensor: Callable[[str], np.ndarray],
    *,
    limit: int,
    report_bytes: Callable[[int], None] = lambda nbytes: None,
    primary: bool = True,
) -> list[Path]:
    """Write `get_tensor(name)` for each name of `tensors` (name -> type such as "F32", shape) into one file or several.

    Only one tensor is in memory at a time. Every process calls `get_tensor` for all names in order, and only the
    `primary` one writes. `report_bytes` gets the bytes of each tensor that is written. Returns the files.
    """
    sizes = {name: count_bytes(spec) for name, spec in tensors.items()}
    shards = plan_shards(sizes, limit)
    paths = [folder / _shard_name(number, len(shards)) for number in range(len(shards))]
    for path, names in zip(paths, shards, strict=True):
        arrays = (_check_array(name, get_tensor(name), *tensors[name]) for name in names)
        if primary:
            _write_file(path, {name: tensors[name] for name in names}, arrays, report_bytes)
        else:
            for _ in arrays:
                pass
    if primary and len(shards) > 1:
        shard_of = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        (folder / _INDEX).write_text(json.dumps({"metadata": total, "weight_map": shard_of}, indent=2) + "\n")
    return paths


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _check_array(name: str, array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    assert _NAMES[array.dtype] == dtype and array.shape == shape, (name, array.dtype, array.shape, dtype, shape)
    return array


def _write_file(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
    report_bytes: Callable[[int], None],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + count_bytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic.name_in_errors(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            report_bytes(array.nbytes)
        file.flush()
        os.fsync(file.fileno())
