"""The stages of preparation for one unit, run by worker processes: scan, sample, tokenize. No device code."""

from collections.abc import Iterator
import dataclasses
import errno
import functools
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path
from typing import NamedTuple
import zlib

import numpy as np

from llmjax.atomic import write_bytes
from llmjax.data.readers.documents import NO_FAULT, Document, Reject, read_unit
from llmjax.data.readers.sources import Unit
from llmjax.data.store import minhash, token_store
from llmjax.data.store.split import NONE, SPLITS, TRAIN, VALIDATION
from llmjax.data.store.tokenizer import Tokenizer, pieces_of, read_tokenizer_file
from llmjax.data.store.tokenizer_training import train_sentencepiece
from llmjax.errors import UserError
from llmjax.run.workdir import read_json

_BATCH_BYTES = 1 << 20  # text that is tokenized at a time


class Scan(NamedTuple):
    """What is known of a unit after reading it once; arrays are memory-mapped.

    hashes     uint64 [documents, 2], of the content
    sizes      int64 [documents], UTF-8 bytes
    given      uint8 [documents], the split that a record names, or 255
    rejects    reason -> count
    """

    hashes: np.ndarray
    sizes: np.ndarray
    given: np.ndarray
    rejects: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Workplace:
    """The folder of a preparation that is not finished: everything here can be made again."""

    folder: Path

    def path(self, what: str, unit: Unit) -> Path:
        return self.folder / f"{what}-{unit.source}-{unit.index:05d}"

    def marker(self, what: str, unit: Unit) -> dict | None:
        """What a finished task left behind, else None."""
        try:
            return read_json(self.path(what, unit).with_suffix(".json"))
        except UserError:
            return None

    def result(self, what: str, unit: Unit) -> dict:
        """What a task that is known to have finished left behind."""
        if (record := read_json(path := self.path(what, unit).with_suffix(".json"))) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return record

    def mark(self, what: str, unit: Unit, record: dict) -> None:
        _require_folder(self.folder)
        write_bytes(self.path(what, unit).with_suffix(".json"), json.dumps(record).encode())

    def load_scan(self, unit: Unit) -> Scan:
        arrays = [np.load(self.path(name, unit).with_suffix(".npy"), mmap_mode="r") for name in Scan._fields[:3]]
        return Scan(*arrays, rejects=self.result("scan", unit)["rejects"])

    def signatures(self, unit: Unit) -> np.ndarray:
        """uint32 [documents, minhash.SIZE], memory-mapped; only of a preparation that looks for near copies."""
        return np.load(self.path("signatures", unit).with_suffix(".npy"), mmap_mode="r")

    def splits(self, unit: Unit) -> np.ndarray:
        """uint8 [documents]: the split of each document."""
        return np.load(self.path("splits", unit).with_suffix(".npy"))


def _require_folder(folder: Path) -> None:
    """Raise FileNotFoundError where a folder of the store is gone: writing a file would make it again, empty."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def scan(unit: Unit, place: Workplace, part_bytes: int | None, near_copies: bool) -> int:
    """Hash and fingerprint every document, write down every reject; returns the bytes of text. Done once a unit."""
    done = place.marker("scan", unit)
    if done and done["part_bytes"] == part_bytes:
        return done["bytes"]
    hashes, sizes, signatures, given, rejects, bad_bytes = [], [], [], [], {}, 0
    with open(place.path("rejects", unit).with_suffix(".jsonl"), "w") as file:
        for record in read_unit(unit, part_bytes):
            if isinstance(record, Reject):
                rejects[record.reason] = rejects.get(record.reason, 0) + 1
                bad_bytes += record.size if record.reason not in NO_FAULT else 0
                line = {"source": unit.source, "where": record.id, "reason": record.reason, "excerpt": record.excerpt}
                file.write(json.dumps(line) + "\n")
            else:
                hashes.append(hashlib.sha256(record.data).digest()[:16])
                sizes.append(len(record.data))
                given.append(SPLITS.index(record.split) if record.split else NONE)
                if near_copies:
                    signatures.append(minhash.signature(record.data))
    arrays = {
        "hashes": np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64).reshape(-1, 2),
        "sizes": np.array(sizes, np.int64),
        "given": np.array(given, np.uint8),
    }
    if near_copies:
        arrays["signatures"] = np.array(signatures, np.uint32).reshape(-1, minhash.SIZE)
    for name, array in arrays.items():
        np.save(place.path(name, unit).with_suffix(".npy"), array)
    record = {"part_bytes": part_bytes, "bytes": sum(sizes), "rejects": rejects, "bad_bytes": bad_bytes}
    place.mark("scan", unit, record)
    return sum(sizes)


def documents(unit: Unit, place: Workplace, part_bytes: int | None, split: int) -> Iterator[tuple[int, Document]]:
    """(index in the unit, document) of one split. Raises UserError where the unit changed since it was scanned."""
    splits, index = place.splits(unit), 0
    for record in read_unit(unit, part_bytes):
        if isinstance(record, Document):
            if index < len(splits) and splits[index] == split:
                yield index, record
            index += 1
    if index != len(splits):
        where = f"data.sources.{unit.source}: {unit.items[0].path}"
        raise UserError(f"{where} changed while it was read; run prepare again")


def sample(unit: Unit, place: Workplace, part_bytes: int | None, share: float) -> None:
    """A `share` of the unit's training text, in pieces of a few KiB chosen by content, for training a tokenizer."""
    hashes = place.load_scan(unit).hashes[:, 1]
    with open(place.path("sample", unit), "wb") as file:
        for index, document in documents(unit, place, part_bytes, TRAIN):
            for number, piece in enumerate(pieces_of(document.text)):
                if zlib.crc32(b"%d:%d" % (hashes[index], number)) < share * (1 << 32):
                    file.write(piece.encode())


def train_tokenizer(units: list[Unit], place: Workplace, algorithm: str, vocab_size: int) -> bytes:
    """A SentencePiece model trained on what `sample` chose, in the order of the units."""
    texts = (place.path("sample", unit).read_bytes().decode() for unit in units)
    return train_sentencepiece(texts, algorithm=algorithm, vocab_size=vocab_size)


@functools.cache
def _tokenizer(kind: str, path: Path) -> Tokenizer:
    return read_tokenizer_file(kind, path)


def tokenize(unit: Unit, place: Workplace, part_bytes: int | None, kind: str, model: Path, folder: Path) -> None:
    """Write the unit's shard of every split; the marker holds the shards' infos and what the tokenizer lost."""
    done, tokenizer = place.marker("tokens", unit), _tokenizer(kind, model)
    if done is not None and done["tokenizer_sha256"] == tokenizer.sha256:
        found = {split: token_store.read_shard_info(folder / split, unit.index) for split in done["shards"]}
        if found == done["shards"]:
            return
    _require_folder(folder)
    splits, sizes = place.splits(unit), place.load_scan(unit).sizes
    shards, lossy = {}, []
    for number, split in enumerate(SPLITS):
        if (splits == number).any():
            chosen = (document for _, document in documents(unit, place, part_bytes, number))
            shards[split] = token_store.write_shard(
                folder / split,
                unit.index,
                _encoded(chosen, tokenizer, lossy),
                vocab_size=tokenizer.vocab_size,
                text_bytes=int(sizes[splits == number].sum()),
                tokenizer_sha256=tokenizer.sha256,
            )
    record = {"tokenizer_sha256": tokenizer.sha256, "shards": shards, "lossy": len(lossy), "first_lossy": lossy[:1]}
    place.mark("tokens", unit, record)


def _encoded(chosen: Iterator[Document], tokenizer: Tokenizer, lossy: list[str]) -> Iterator[np.ndarray]:
    """Token ids and EOS of every document; the ids of those that decode to another text are added to `lossy`."""
    batch, size = [], 0
    for document in chosen:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES:
            yield from _encoded_batch(batch, tokenizer, lossy)
            batch, size = [], 0
    yield from _encoded_batch(batch, tokenizer, lossy)


def _encoded_batch(batch: list[Document], tokenizer: Tokenizer, lossy: list[str]) -> Iterator[np.ndarray]:
    for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
        if tokenizer.decode(ids) != document.text:
            lossy.append(document.id)
        yield np.append(ids, np.int32(tokenizer.eos_id))


def compress(units: list[Unit], place: Workplace, part_bytes: dict[str, int | None]) -> dict[str, dict[str, int]]:
    """Bytes that gzip -9 and xz -9 need for the validation text: document by document, and all in one piece."""
    texts = [
        document.data for unit in units for _, document in documents(unit, place, part_bytes[unit.source], VALIDATION)
    ]
    together = b"".join(texts)
    return {
        name: {"per_document": sum(len(shrink(text)) for text in texts), "concatenated": len(shrink(together))}
        for name, shrink in (("gzip -9", _gzip), ("xz -9", _xz))
    }


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 9)


def _xz(data: bytes) -> bytes:
    """xz -9 with a window no larger than the data: the same bytes, without 700 MB of memory for each document."""
    window = min(max(1 << (len(data) - 1).bit_length(), 4096), 1 << 26) if data else 4096
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}])
