"""The token store: documents as flat token ids in checksummed shards; opening it reads one manifest."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
import hashlib
import json
import os
from pathlib import Path
import threading
import zlib

import numpy as np

from llmjax.atomic import atomic_write, remove_partial, write_bytes
from llmjax.errors import UserError
from llmjax.run.workdir import read_json

VERSION = 2
BLOCK_BYTES = 1 << 20  # tokens are checksummed by block, so that the first touch of a shard need not read all of it
_READ_BYTES = 1 << 24  # at a time, where a whole shard is verified
_MAX_OFFSET_BYTES = 1 << 28  # of document offsets that are kept in memory
_MEND = "restore it from a copy, or delete the store and run `llmjax prepare` again"


def tokens_path(folder: Path, index: int) -> Path:
    return Path(folder) / f"tokens-{index:05d}.bin"


def offsets_path(folder: Path, index: int) -> Path:
    return Path(folder) / f"offsets-{index:05d}.npy"


def info_path(folder: Path, index: int) -> Path:
    return Path(folder) / f"shard-{index:05d}.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """The stored type: two bytes where every id fits, four otherwise; little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def fingerprint_of(record: dict) -> str:
    """sha256 (hex) of the canonical JSON of `record`, its own "fingerprint" left out."""
    kept = {name: value for name, value in record.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_shard(
    folder: Path,
    index: int,
    documents: Iterable[np.ndarray],
    *,
    vocab_size: int,
    text_bytes: int,
    tokenizer_sha256: str,
) -> dict:
    """Write one shard and return its info; its info file appears last, so a shard with one is whole.

    documents          token ids of each document, 1-D, at least one token, EOS at the end included
    text_bytes         UTF-8 bytes of the documents' original text
    tokenizer_sha256   of the tokenizer that gave the ids
    Raises ValueError for an empty document or an id outside the vocabulary. Shards are independent: any process may
    write any of them, in any order.
    """
    folder = Path(folder)
    dtype, crc, max_id, lengths = token_dtype(vocab_size), 0, -1, []
    with atomic_write(tokens_path(folder, index)) as file:
        for document in documents:
            document = np.asarray(document)
            if document.ndim != 1 or not document.size:
                raise ValueError(f"shard {index}, document {len(lengths)}: expected a non-empty 1-D array of token ids")
            if document.min() < 0 or document.max() >= vocab_size:
                raise ValueError(f"shard {index}, document {len(lengths)}: a token id is outside 0..{vocab_size - 1}")
            data = document.astype(dtype).tobytes()
            file.write(data)
            crc = zlib.crc32(data, crc)
            max_id = max(max_id, int(document.max()))
            lengths.append(document.size)
        file.seek(0)
        blocks = [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8")
    with atomic_write(offsets_path(folder, index)) as file:
        np.save(file, offsets)
    info = {
        "index": index,
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "text_bytes": int(text_bytes),
        "bytes": int(offsets[-1]) * dtype.itemsize,
        "crc32": crc,
        "block_crc32": "".join(f"{block:08x}" for block in blocks),
        "offsets_crc32": zlib.crc32(offsets.tobytes()),
        "max_id": max_id,
        "tokenizer_sha256": tokenizer_sha256,
    }
    write_bytes(info_path(folder, index), json.dumps(info).encode())
    return info


def read_shard_info(folder: Path, index: int) -> dict | None:
    """The info of a finished shard whose files have the right sizes, else None: a killed writer resumes by it."""
    try:
        info = read_json(info_path(folder, index)) or {}
        if offsets_path(folder, index).stat().st_size < 8 * (info["documents"] + 1):
            return None
        return info if tokens_path(folder, index).stat().st_size == info["bytes"] else None
    except (OSError, KeyError, TypeError, UserError):
        return None


def write_manifest(
    folder: Path,
    shards: list[dict],
    *,
    vocab_size: int,
    eos_id: int,
    bos_id: int | None,
    source: str,
    split: str,
    tokenizer_sha256: str,
) -> dict:
    """Declare the shards (infos from write_shard) one store, in order of index; returns the manifest.

    Its fingerprint covers every token (by checksum), document edge and special id, and no path. Leftovers of killed
    writers are removed. Raises UserError where a shard on disk is another one, or has the ids of another tokenizer.
    """
    shards = sorted(shards, key=lambda info: info["index"])
    for info in shards:
        if read_shard_info(folder, info["index"]) != info:
            raise UserError(
                f"token shard {tokens_path(folder, info['index'])} is not the one that was written; {_MEND}"
            )
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
    manifest["fingerprint"] = fingerprint_of(manifest)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    write_bytes(folder / "manifest.json", json.dumps(manifest).encode())
    return manifest


def _check_tokenizer(folder: Path, shards: list[dict], tokenizer_sha256: str) -> None:
    for info in shards:
        if info["tokenizer_sha256"] != tokenizer_sha256:
            raise UserError(
                f"token shard {tokens_path(folder, info['index'])} holds ids of another tokenizer (sha256 "
                f"{info['tokenizer_sha256'][:12]}, the store's is {tokenizer_sha256[:12]}); {_MEND}"
            )


class _ShardFile:
    """An open shard. It is read, not mapped: touching a mapping of a truncated file kills the process (SIGBUS)."""

    def __init__(self, path: Path):
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end); fewer where the file ends."""
        data = os.pread(self._descriptor, end - start, start)
        while len(data) < end - start and (
            more := os.pread(self._descriptor, end - start - len(data), start + len(data))
        ):
            data += more
        return data

    def state(self) -> tuple[int, ...]:
        """What changes when somebody writes to the file in place: (device, inode, bytes, time of the last write)."""
        found = os.fstat(self._descriptor)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def __del__(self):
        if self._descriptor >= 0:  # closed with its last reader, which may be in another thread
            os.close(self._descriptor)


class TokenStore:
    """Random access to the flat stream of all shards' tokens.

    Opening reads the manifest and compares file sizes; shards are opened at first touch, at most `max_open` at once.
    The first touch of each block compares its checksum, and so does the next touch after the file was written to, so
    that no token of a shard that was changed during a run is ever returned (a write through a memory map that some
    other process held before the first touch is not seen, as the kernel then leaves the time of the last write alone).
    Damage raises UserError naming the shard and the fix.
    """

    def __init__(self, folder: Path | str, *, max_open: int = 128):
        self.folder = Path(folder)
        manifest = read_json(self.folder / "manifest.json")
        if manifest is None:
            raise UserError(f"token store {self.folder}: no manifest.json; {_MEND}")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"token store {self.folder}: format version {manifest.get('version')}, this llmjax reads {VERSION}; "
                f"{_MEND}"
            )
        if manifest.get("fingerprint") != fingerprint_of(manifest):
            raise UserError(f"token store {self.folder}: manifest.json is not what was written (fingerprint); {_MEND}")
        self.fingerprint: str = manifest["fingerprint"]
        self.documents: int = manifest["documents"]
        self.tokens: int = manifest["tokens"]
        self.text_bytes: int = manifest["text_bytes"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.bos_id: int | None = manifest["bos_id"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self.shards: list[dict] = manifest["shards"]
        _check_tokenizer(self.folder, self.shards, self.tokenizer_sha256)
        self.dtype = token_dtype(self.vocab_size)
        counts = np.array([info["tokens"] for info in self.shards], np.int64)
        self._edges = np.concatenate([[0], np.cumsum(counts)])  # flat offset of each shard's first token, and the end
        self._max_open = max_open
        self._open: OrderedDict[int, _ShardFile] = OrderedDict()
        self._open_offsets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._offset_bytes = 0
        # By shard: the state of its file, and which of its blocks were compared since; outlives the open file.
        self._verified: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}
        self._lock = threading.Lock()
        self._check_sizes()

    def lengths(self) -> np.ndarray:
        """Tokens of each document, EOS included: int64 [documents]."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(self._offsets(i)) for i in range(len(self.shards)))])

    def starts(self) -> np.ndarray:
        """Flat offset of each document's first token: int64 [documents]."""
        parts = (self._offsets(i)[:-1] + self._edges[i] for i in range(len(self.shards)))
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def starts_between(self, start: int, end: int) -> np.ndarray:
        """Those of `starts()` that lie in [start, end); touches only the shards that hold this span."""
        first, last = np.searchsorted(self._edges, [start, end], "right") - 1
        parts = [np.zeros(0, np.int64)]
        for index in range(first, min(int(last) + 1, len(self.shards))):
            edge, offsets = self._edges[index], self._offsets(index)[:-1]
            a, b = np.searchsorted(offsets, [start - edge, end - edge])
            parts.append(offsets[a:b] + edge)
        return np.concatenate(parts)

    def document_groups(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(starts, lengths) of all documents, by groups of whole shards of at most `tokens` tokens (or one shard)."""
        first = 0
        while first < len(self.shards):
            last = max(first + 1, int(np.searchsorted(self._edges, self._edges[first] + tokens, "right")) - 1)
            offsets = [self._offsets(i) + self._edges[i] for i in range(first, last)]
            yield np.concatenate([o[:-1] for o in offsets]), np.concatenate([np.diff(o) for o in offsets])
            first = last

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the flat stream: int32 [length]."""
        return self.gather(np.array([start], np.int64), np.array([length], np.int64))

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of many spans, one after the other: int32 [sum of lengths].

        Raises UserError for damage: a block that differs from its checksum, or an id outside the vocabulary.
        """
        ends = starts + lengths
        if starts.size and (starts.min() < 0 or ends.max() > self.tokens or lengths.min() < 0):
            raise IndexError(f"a span leaves the stream of {self.tokens} tokens in {self.folder}")
        first = np.searchsorted(self._edges, starts, "right") - 1
        crossing = ends > self._edges[np.minimum(first + 1, len(self.shards))]
        if crossing.any():
            starts, ends, first = self._cut_at_edges(starts, ends)
        edges = self._edges[np.minimum(first, len(self.shards))]
        spans = zip(first.tolist(), (starts - edges).tolist(), (ends - edges).tolist(), strict=True)
        parts = [self._span(shard, a, b) for shard, a, b in spans if a < b]
        if not parts:
            return np.zeros(0, np.int32)
        tokens = np.concatenate(parts)
        if tokens.max() >= self.vocab_size:
            self._blame(starts, ends)
        return tokens.astype(np.int32)

    def verify(self) -> int:
        """Read every byte and compare every checksum; returns how many bytes that were.

        Raises UserError naming the first damaged shard.
        """
        nbytes = 0
        for index, info in enumerate(self.shards):
            nbytes += self._offsets(index).nbytes + info["bytes"]
            file, crc = self._shard(index), 0
            for start in range(0, info["bytes"], _READ_BYTES):
                crc = zlib.crc32(file.read(start, min(start + _READ_BYTES, info["bytes"])), crc)
            if crc != info["crc32"]:
                raise UserError(
                    f"token shard {self._path(index)} is damaged: checksum differs from the manifest; {_MEND}"
                )
        return nbytes

    def _path(self, index: int) -> Path:
        return tokens_path(self.folder, self.shards[index]["index"])

    def _check_sizes(self) -> None:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        missing, wrong = [], []
        for index, info in enumerate(self.shards):
            path = self._path(index)
            missing += [p.name for p in (path, offsets_path(self.folder, info["index"])) if p.name not in sizes]
            if sizes.get(path.name, info["bytes"]) != info["bytes"]:
                wrong.append(f"{path.name} has {sizes[path.name]} bytes, expected {info['bytes']}")
        if missing:
            raise UserError(
                f"token store {self.folder}: {len(missing)} files are missing: {', '.join(missing)}; {_MEND}"
            )
        if wrong:
            raise UserError(f"token store {self.folder}: damaged shards: {'; '.join(wrong)}; {_MEND}")

    def _offsets(self, index: int) -> np.ndarray:
        """Where the shard's documents begin, and its end: int64 [documents + 1], checksum compared."""
        with self._lock:
            if (offsets := self._open_offsets.get(index)) is not None:
                return offsets
            info = self.shards[index]
            path = offsets_path(self.folder, info["index"])
            try:
                offsets = np.load(path)
                if zlib.crc32(offsets) != info["offsets_crc32"]:
                    raise ValueError("checksum differs from the manifest")
            except (OSError, ValueError) as error:
                raise UserError(f"document offsets {path} are damaged ({error}); {_MEND}") from None
            self._open_offsets[index] = offsets
            while (
                len(self._open_offsets) > 1 and sum(o.nbytes for o in self._open_offsets.values()) > _MAX_OFFSET_BYTES
            ):
                self._open_offsets.popitem(last=False)
            return offsets

    def _shard(self, index: int) -> _ShardFile:
        with self._lock:
            if (file := self._open.get(index)) is not None:
                self._open.move_to_end(index)
                return file
            try:
                file = self._open[index] = _ShardFile(self._path(index))
            except OSError as error:
                raise UserError(f"token shard {self._path(index)} cannot be read ({error.strerror}); {_MEND}") from None
            if index not in self._verified:
                self._start_verifying(index, file)
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return file

    def _start_verifying(self, index: int, file: _ShardFile) -> None:
        """Take note of the file's state, with no block compared yet. Raises UserError for another size."""
        state, expected = file.state(), self.shards[index]["bytes"]
        if state[2] != expected:
            raise UserError(
                f"token shard {self._path(index)} has {state[2]} bytes, expected {expected}: it was truncated or "
                f"written to while it was in use; {_MEND}"
            )
        self._verified[index] = state, np.zeros(-(-expected // BLOCK_BYTES), bool)

    def _span(self, index: int, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of one shard, its blocks compared with their checksums at first touch."""
        file = self._open.get(index)
        if file is None or len(self.shards) > self._max_open:
            file = self._shard(index)
        item = self.dtype.itemsize
        while True:
            state, verified = self._verified[index]
            for block in range(start * item // BLOCK_BYTES, (end * item - 1) // BLOCK_BYTES + 1):
                if not verified[block]:
                    self._verify_block(index, file, block)
                    verified[block] = True
            data = file.read(start * item, end * item)
            # Looked at after reading: whoever wrote to the file before it was read has changed its state by now.
            if file.state() == state:
                return np.frombuffer(data, self.dtype)
            self._start_verifying(index, file)

    def _verify_block(self, index: int, file: _ShardFile, block: int) -> None:
        start, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.shards[index]["bytes"])
        expected = int(self.shards[index]["block_crc32"][8 * block : 8 * block + 8], 16)
        if zlib.crc32(file.read(start, end)) != expected:
            item = self.dtype.itemsize
            raise UserError(
                f"token shard {self._path(index)} is damaged between tokens {start // item} and {end // item}: "
                f"checksum differs from the manifest; {_MEND}"
            )

    def _cut_at_edges(self, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same spans, those that cross shards cut in one piece a shard: (starts, ends, shard of each)."""
        pieces = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            inner = self._edges[(self._edges > start) & (self._edges < end)].tolist()
            pieces += zip([start, *inner], [*inner, end], strict=True)
        cut = np.array(pieces, np.int64).reshape(-1, 2)
        return cut[:, 0], cut[:, 1], np.searchsorted(self._edges, cut[:, 0], "right") - 1

    def _blame(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Name the first id outside the vocabulary among these spans of one shard each."""
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            index = int(np.searchsorted(self._edges, start, "right")) - 1
            local = start - int(self._edges[index])
            tokens = self._span(index, local, local + end - start)
            if tokens.size and tokens.max() >= self.vocab_size:
                offset = int(np.argmax(tokens >= self.vocab_size))
                raise UserError(
                    f"token shard {self._path(index)} holds id {tokens[offset]} at offset {local + offset}, "
                    f"outside the vocabulary of {self.vocab_size}; {_MEND}"
                )
