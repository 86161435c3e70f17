"""The files of a measured unit: texts, and their scores as columns.

KEY.jsonl.zst    one line per record, in the unit's order: a document, or an excerpt of a dropped one
KEY.npz          columns, one row per record
KEY.signatures   uint32 [records, minhash.SIZE]; empty without the stage duplicates
KEY.json         marks a complete unit: it is written last

KEY is a hash of VERSION, the unit, the state of its files and every setting that measurements depend on. Thresholds are
not included.
"""

import array
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import zstandard

from llmjax.data.store import minhash

VERSION = 5  # of these files and of what the stages measure; a new version measures everything again
NOT_DROPPED = -1  # in the column "drop_stage": no stage dropped the record while it was measured
_LANGUAGE_BYTES = 8
_LEVEL = 3  # of Zstandard: a higher level saves a tenth of the space and takes three times as long


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The files of one unit."""

    folder: Path
    key: str

    @property
    def texts(self) -> Path:
        """Zstandard file of JSON lines."""
        return self.folder / f"{self.key}.jsonl.zst"

    @property
    def columns(self) -> Path:
        """The .npz file of the columns."""
        return self.folder / f"{self.key}.npz"

    @property
    def signatures(self) -> Path:
        """Raw uint32 MinHash signatures."""
        return self.folder / f"{self.key}.signatures"

    @property
    def marker(self) -> Path:
        """The file that is written last."""
        return self.folder / f"{self.key}.json"

    def is_complete(self) -> bool:
        """Whether all files of the unit exist."""
        return all(path.is_file() for path in (self.marker, self.texts, self.columns, self.signatures))

    def read_signatures(self) -> np.ndarray:
        """uint32 [records, minhash.SIZE], mapped from the file; rows of dropped records are 0."""
        if not self.signatures.stat().st_size:
            return np.zeros((0, minhash.SIZE), np.uint32)
        return np.memmap(self.signatures, np.uint32, "r").reshape(-1, minhash.SIZE)

    def read_records(self) -> Iterator[dict[str, Any]]:
        """The objects of the text file, one per record."""
        with open(self.texts, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            yield from map(json.loads, io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20))


class Columns:
    """Columns of a unit while it is measured, about 400 bytes per record. Missing scores are NaN."""

    def __init__(self, stages: Sequence[str]):
        self._stages = list(stages)
        self._id_hash, self._content_hash, self._sizes = array.array("Q"), bytearray(), array.array("q")
        self._drop_stage, self._reason, self._language = array.array("h"), array.array("i"), bytearray()
        self._scores: dict[str, array.array] = {}
        self._reasons: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._drop_stage)

    def add(
        self,
        *,
        id_hash: int,
        content_hash: bytes,
        sizes: list[tuple[int, int]],
        scores: Mapping[str, float],
        language: str,
        drop: tuple[str, str] | None,
    ) -> None:
        """Add one record.

        sizes  (bytes, tokens) before each stage and after the last; (0, 0) after a drop
        drop   (stage, reason) if a stage dropped the record
        """
        stage, reason = NOT_DROPPED, 0
        if drop:
            stage, reason = self._stages.index(drop[0]), self._reasons.setdefault(drop[1], len(self._reasons))
        for name, value in scores.items():
            column = self._scores.setdefault(name, array.array("f"))
            _fill(column, len(self))
            column.append(value)
        self._id_hash.append(id_hash)
        self._content_hash += content_hash
        self._drop_stage.append(stage)
        self._reason.append(reason)
        for pair in sizes:
            self._sizes.extend(pair)
        self._language += language.encode()[:_LANGUAGE_BYTES].ljust(_LANGUAGE_BYTES, b"\0")

    def arrays(self) -> dict[str, Any]:
        """The columns by name, one row per record, and `reasons`: the texts that `reason` indexes."""
        count = len(self)
        arrays = {
            "id_hash": np.frombuffer(self._id_hash, np.uint64),
            "content_hash": np.frombuffer(self._content_hash, ">u8").reshape(count, 2).astype(np.uint64),
            "drop_stage": np.frombuffer(self._drop_stage, np.int16),
            "reason": np.frombuffer(self._reason, np.int32),
            "sizes": np.frombuffer(self._sizes, np.int64).reshape(count, len(self._stages) + 1, 2),
            "reasons": np.array(list(self._reasons), dtype=np.str_),
            "language": np.frombuffer(self._language, f"S{_LANGUAGE_BYTES}"),
        }
        for name, column in sorted(self._scores.items()):
            _fill(column, count)
            arrays[f"score.{name}"] = np.frombuffer(column, np.float32)
        return arrays


def _fill(column: array.array, count: int) -> None:
    """Extend a column to `count` records with NaN."""
    if len(column) < count:
        column.extend([math.nan] * (count - len(column)))


class LineWriter:
    """Writes JSON lines to a Zstandard file, byte-identical for equal lines."""

    def __init__(self, file: BinaryIO):
        self._writer = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).stream_writer(file, closefd=False)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        self._writer.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
