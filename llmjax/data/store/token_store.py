"""The token store: documents as flat token ids in checksummed shards; opening it reads one manifest."""

from collections import OrderedDict
from collections.abc import Iterator
import hashlib
import json
import os
from pathlib import Path
import threading
from typing import Any
import zlib

import numpy as np

from llmjax.atomic import remove_partial, write_bytes
from llmjax.data.store.checked_file import CheckedFile
from llmjax.data.store.shards import SCORED, labels_path, offsets_path, read_shard_info, token_dtype, tokens_path
from llmjax.errors import UserError
from llmjax.run.workdir import read_json

VERSION = 2
_MAX_OFFSET_BYTES = 1 << 28  # of document offsets that are kept in memory
_HINT = "restore it from a copy, or delete the store and run `llmjax prepare` again"


def compute_fingerprint(record: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `record` without its own "fingerprint"."""
    fields = {name: value for name, value in record.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(
    folder: Path,
    shards: list[dict[str, Any]],
    *,
    vocab_size: int,
    eos_id: int,
    bos_id: int | None,
    source: str,
    split: str,
    tokenizer_sha256: str,
) -> dict[str, Any]:
    """Make a store of the shards (infos from write_shard), in order of index, and return its manifest.

    The fingerprint covers every token (by checksum), document edge and special id, and no path. Partial files of killed
    writers are removed. Raises UserError if a shard on disk is another one, or has the ids of another tokenizer.
    """
    shards = sorted(shards, key=lambda info: info["index"])
    for info in shards:
        if read_shard_info(folder, info["index"]) != info:
            path = tokens_path(folder, info["index"])
            raise UserError(f"token shard {path} is not the one that was written; {_HINT}")
    _check_tokenizer(folder, shards, tokenizer_sha256)
    manifest = {
        "version": VERSION,
        "source": source,
        "split": split,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "bos_id": bos_id,
        "tokenizer_sha256": tokenizer_sha256,
        "documents": sum(info["documents"] for info in shards),
        "tokens": sum(info["tokens"] for info in shards),
        "text_bytes": sum(info["text_bytes"] for info in shards),
        "shards": shards,
    }
    manifest["fingerprint"] = compute_fingerprint(manifest)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    write_bytes(folder / "manifest.json", json.dumps(manifest).encode())
    return manifest


def _check_tokenizer(folder: Path, shards: list[dict[str, Any]], tokenizer_sha256: str) -> None:
    for info in shards:
        if info["tokenizer_sha256"] != tokenizer_sha256:
            raise UserError(
                f"token shard {tokens_path(folder, info['index'])} holds ids of another tokenizer (sha256 "
                f"{info['tokenizer_sha256'][:12]}, the store's is {tokenizer_sha256[:12]}); {_HINT}"
            )


class TokenStore:
    """Random access to the flat stream of all shards' tokens.

    Opening reads the manifest and compares file sizes. A shard is opened by its first read, at most `max_open` at once,
    and read through CheckedFile, so no token of a shard that was changed during a run is returned. Damage raises
    UserError naming the shard and the fix.
    """

    def __init__(self, folder: Path | str, *, max_open: int = 128):
        self.folder = Path(folder)
        manifest = read_json(self.folder / "manifest.json")
        if manifest is None:
            raise UserError(f"token store {self.folder}: no manifest.json; {_HINT}")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"token store {self.folder}: format version {manifest.get('version')}, this llmjax reads {VERSION}; "
                f"{_HINT}"
            )
        if manifest.get("fingerprint") != compute_fingerprint(manifest):
            raise UserError(f"token store {self.folder}: manifest.json is not what was written (fingerprint); {_HINT}")
        self.fingerprint: str = manifest["fingerprint"]
        self.documents: int = manifest["documents"]
        self.tokens: int = manifest["tokens"]
        self.text_bytes: int = manifest["text_bytes"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.bos_id: int | None = manifest["bos_id"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self.shards: list[dict[str, Any]] = manifest["shards"]
        self.label_width: int = self.shards[0].get("label_width", 0) if self.shards else 0  # 0: no labels
        # Whether the store holds dialogues, of which only marked tokens are scored.
        self.has_marks: bool = any("scored_tokens" in info for info in self.shards)
        self.scored_tokens: int = sum(info.get("scored_tokens", info["tokens"]) for info in self.shards)
        _check_tokenizer(self.folder, self.shards, self.tokenizer_sha256)
        self.dtype = token_dtype(self.vocab_size, has_marks=self.has_marks)
        counts = np.array([info["tokens"] for info in self.shards], np.int64)
        self._edges = np.concatenate([[0], np.cumsum(counts)])  # flat offset of each shard's first token, and the end
        self._files = [
            CheckedFile(
                self._path(index),
                name="token shard",
                size=info["bytes"],
                block_crc32=info["block_crc32"],
                hint=_HINT,
            )
            for index, info in enumerate(self.shards)
        ]
        self._max_open = max_open
        self._open: OrderedDict[int, CheckedFile] = OrderedDict()  # least recently used first
        self._offsets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._labels: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._check_sizes()

    def lengths(self) -> np.ndarray:
        """Tokens of each document, EOS included: int64 [documents]."""
        parts = (np.diff(self._read_offsets(index)) for index in range(len(self.shards)))
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def starts(self) -> np.ndarray:
        """Flat offset of each document's first token: int64 [documents]."""
        parts = (self._read_offsets(index)[:-1] + self._edges[index] for index in range(len(self.shards)))
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def starts_between(self, start: int, end: int) -> np.ndarray:
        """Those of `starts()` that lie in [start, end); reads only the shards that hold this span."""
        first, last = np.searchsorted(self._edges, [start, end], "right") - 1
        parts = [np.zeros(0, np.int64)]
        for index in range(first, min(int(last) + 1, len(self.shards))):
            edge, offsets = self._edges[index], self._read_offsets(index)[:-1]
            a, b = np.searchsorted(offsets, [start - edge, end - edge])
            parts.append(offsets[a:b] + edge)
        return np.concatenate(parts)

    def document_groups(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (starts, lengths) of all documents, by groups of whole shards of at most `tokens` tokens (or one)."""
        first = 0
        while first < len(self.shards):
            last = max(first + 1, int(np.searchsorted(self._edges, self._edges[first] + tokens, "right")) - 1)
            offsets = [self._read_offsets(index) + self._edges[index] for index in range(first, last)]
            yield np.concatenate([o[:-1] for o in offsets]), np.concatenate([np.diff(o) for o in offsets])
            first = last

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the flat stream: int32 [length]."""
        return self.gather(np.array([start], np.int64), np.array([length], np.int64))

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of many spans, one after the other: int32 [sum of lengths].

        Raises UserError for damage: a block that differs from its checksum, or an id outside the vocabulary.
        """
        return self.gather_scored(starts, lengths)[0]

    def gather_scored(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(tokens as `gather` returns them, bool of the same shape: whether each is scored; None: all are)."""
        ends = starts + lengths
        if starts.size and (starts.min() < 0 or ends.max() > self.tokens or lengths.min() < 0):
            raise IndexError(f"a span leaves the stream of {self.tokens} tokens in {self.folder}")
        first = np.searchsorted(self._edges, starts, "right") - 1
        crosses_shards = ends > self._edges[np.minimum(first + 1, len(self.shards))]
        if crosses_shards.any():
            starts, ends, first = self._split_at_shards(starts, ends)
        edges = self._edges[np.minimum(first, len(self.shards))]
        spans = zip(first.tolist(), (starts - edges).tolist(), (ends - edges).tolist(), strict=True)
        parts = [self._read_span(shard, a, b) for shard, a, b in spans if a < b]
        if not parts:
            return np.zeros(0, np.int32), np.zeros(0, bool) if self.has_marks else None
        tokens = np.concatenate(parts)
        scored = None
        if self.has_marks:
            tokens, scored = tokens & ~SCORED, tokens >= SCORED
        if tokens.max() >= self.vocab_size:
            self._raise_bad_id(starts, ends)
        return tokens.astype(np.int32), scored

    def gather_labels(self, starts: np.ndarray) -> np.ndarray:
        """The labels of the documents that begin at these flat offsets: float32 [starts, label_width]."""
        shards = np.searchsorted(self._edges, starts, "right") - 1
        out = np.zeros((len(starts), self.label_width), np.float32)
        for index in np.unique(shards).tolist():
            chosen = shards == index
            document = np.searchsorted(self._read_offsets(index), starts[chosen] - self._edges[index])
            out[chosen] = self._read_labels(index)[document]
        return out

    def verify(self) -> int:
        """Read every byte, compare every checksum, and return the number of bytes.

        Raises UserError naming the first damaged shard.
        """
        nbytes = 0
        for index, file in enumerate(self._files):
            nbytes += self._read_offsets(index).nbytes + file.size
            self._open_shard(index).verify()
            if self.label_width:
                nbytes += self._read_labels(index).nbytes
        return nbytes

    def _path(self, index: int) -> Path:
        return tokens_path(self.folder, self.shards[index]["index"])

    def _check_sizes(self) -> None:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        missing, wrong = [], []
        for index, info in enumerate(self.shards):
            path = self._path(index)
            files = [path, offsets_path(self.folder, info["index"])]
            files += [labels_path(self.folder, info["index"])] if self.label_width else []
            missing += [p.name for p in files if p.name not in sizes]
            if sizes.get(path.name, info["bytes"]) != info["bytes"]:
                wrong.append(f"{path.name} has {sizes[path.name]} bytes, expected {info['bytes']}")
        if missing:
            listed = ", ".join(missing)
            raise UserError(f"token store {self.folder}: {len(missing)} files are missing: {listed}; {_HINT}")
        if wrong:
            raise UserError(f"token store {self.folder}: damaged shards: {'; '.join(wrong)}; {_HINT}")

    def _read_offsets(self, index: int) -> np.ndarray:
        """Where the shard's documents begin, and its end: int64 [documents + 1], compared with the checksum."""
        with self._lock:
            if (offsets := self._offsets.get(index)) is not None:
                return offsets
            info = self.shards[index]
            path = offsets_path(self.folder, info["index"])
            try:
                offsets = np.load(path)
                if zlib.crc32(offsets) != info["offsets_crc32"]:
                    raise ValueError("checksum differs from the manifest")
            except (OSError, ValueError) as error:
                raise UserError(f"document offsets {path} are damaged ({error}); {_HINT}") from None
            self._offsets[index] = offsets
            while len(self._offsets) > 1 and sum(o.nbytes for o in self._offsets.values()) > _MAX_OFFSET_BYTES:
                self._offsets.popitem(last=False)
            return offsets

    def _read_labels(self, index: int) -> np.ndarray:
        """The labels of a shard's documents: float32 [documents, label_width], compared with the checksum."""
        with self._lock:
            if index not in self._labels:
                info, path = self.shards[index], labels_path(self.folder, self.shards[index]["index"])
                try:
                    labels = np.load(path)
                    if zlib.crc32(labels.tobytes()) != info["labels_crc32"]:
                        raise ValueError("checksum differs from the manifest")
                except (OSError, ValueError) as error:
                    raise UserError(f"labels {path} are damaged ({error}); {_HINT}") from None
                self._labels[index] = labels
            return self._labels[index]

    def _open_shard(self, index: int) -> CheckedFile:
        """The shard's file. Where there are too many open files, the one that was used longest ago is closed."""
        file = self._files[index]
        if len(self._files) > self._max_open:
            with self._lock:
                self._open[index] = file
                self._open.move_to_end(index)
                if len(self._open) > self._max_open:
                    self._open.popitem(last=False)[1].close()
        return file

    def _read_span(self, index: int, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of one shard."""
        item = self.dtype.itemsize
        return np.frombuffer(self._open_shard(index).read(start * item, end * item), self.dtype)

    def _split_at_shards(self, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same spans, those that cross shards split at the edges: (starts, ends, shard of each)."""
        spans = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            inner = self._edges[(self._edges > start) & (self._edges < end)].tolist()
            spans += zip([start, *inner], [*inner, end], strict=True)
        split = np.array(spans, np.int64).reshape(-1, 2)
        return split[:, 0], split[:, 1], np.searchsorted(self._edges, split[:, 0], "right") - 1

    def _raise_bad_id(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Raise UserError naming the first id outside the vocabulary among these spans, each inside one shard."""
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            index = int(np.searchsorted(self._edges, start, "right")) - 1
            local = start - int(self._edges[index])
            tokens = self._read_span(index, local, local + end - start)
            tokens = tokens & ~SCORED if self.has_marks else tokens
            if tokens.size and tokens.max() >= self.vocab_size:
                offset = int(np.argmax(tokens >= self.vocab_size))
                raise UserError(
                    f"token shard {self._path(index)} holds id {tokens[offset]} at offset {local + offset}, "
                    f"outside the vocabulary of {self.vocab_size}; {_HINT}"
                )
