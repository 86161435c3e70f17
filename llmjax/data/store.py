"""The token store: documents as flat token ids in checksummed shards; opening it reads one manifest."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
import hashlib
import json
import mmap
import os
from pathlib import Path
import threading
import zlib

import numpy as np

from llmjax.atomic import atomic_write, remove_partial, write_bytes
from llmjax.config import UserError

VERSION = 1
BLOCK_BYTES = 1 << 20  # tokens are checksummed by block, so that the first touch of a shard need not read all of it
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


def write_shard(folder: Path, index: int, documents: Iterable[np.ndarray], *, vocab_size: int, text_bytes: int) -> dict:
    """Write one shard and return its info; its info file appears last, so a shard with one is whole.

    documents   token ids of each document, 1-D, at least one token, EOS at the end included
    text_bytes  UTF-8 bytes of the documents' original text
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
    }
    write_bytes(info_path(folder, index), json.dumps(info).encode())
    return info


def read_shard_info(folder: Path, index: int) -> dict | None:
    """The info of a finished shard whose files have the right sizes, else None: a killed writer resumes by it."""
    try:
        info = json.loads(info_path(folder, index).read_text())
        if offsets_path(folder, index).stat().st_size < 8 * (info["documents"] + 1):
            return None
        return info if tokens_path(folder, index).stat().st_size == info["bytes"] else None
    except (OSError, ValueError, KeyError):
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
    writers are removed.
    """
    shards = sorted(shards, key=lambda info: info["index"])
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


class TokenStore:
    """Random access to the flat stream of all shards' tokens.

    Opening reads the manifest and compares file sizes; shards are memory-mapped at first touch, at most `max_open` at
    once. The first touch of each block compares its checksum. Damage raises UserError naming the shard and the mend.
    """

    def __init__(self, folder: Path | str, *, max_open: int = 128):
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            self.fingerprint: str = manifest["fingerprint"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"token store {self.folder}: no readable manifest.json ({error}); {_MEND}") from None
        if manifest["version"] != VERSION:
            raise UserError(
                f"token store {self.folder}: format version {manifest['version']}, this llmjax reads {VERSION}; {_MEND}"
            )
        self.documents: int = manifest["documents"]
        self.tokens: int = manifest["tokens"]
        self.text_bytes: int = manifest["text_bytes"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.bos_id: int | None = manifest["bos_id"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self.shards: list[dict] = manifest["shards"]
        self.dtype = token_dtype(self.vocab_size)
        counts = np.array([info["tokens"] for info in self.shards], np.int64)
        self._edges = np.concatenate([[0], np.cumsum(counts)])  # flat offset of each shard's first token, and the end
        self._max_open = max_open
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._open_offsets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._verified: dict[int, np.ndarray] = {}  # by shard: which blocks were compared; outlives the mapping
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
            if zlib.crc32(self._shard(index).data) != info["crc32"]:
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
        """Where the shard's documents begin, and its end: int64 [documents + 1], memory-mapped, checksum compared."""
        with self._lock:
            if (offsets := self._open_offsets.get(index)) is not None:
                return offsets
            info = self.shards[index]
            path = offsets_path(self.folder, info["index"])
            try:
                offsets = np.load(path, mmap_mode="r").view(np.ndarray)
                if zlib.crc32(offsets) != info["offsets_crc32"]:
                    raise ValueError("checksum differs from the manifest")
            except (OSError, ValueError) as error:
                raise UserError(f"document offsets {path} are damaged ({error}); {_MEND}") from None
            self._open_offsets[index] = offsets
            if len(self._open_offsets) > self._max_open:
                self._open_offsets.popitem(last=False)
            return offsets

    def _shard(self, index: int) -> np.ndarray:
        """The shard's tokens, memory-mapped."""
        with self._lock:
            if (tokens := self._open.get(index)) is not None:
                self._open.move_to_end(index)
                return tokens
            with open(self._path(index), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            tokens = self._open[index] = np.frombuffer(mapped, self.dtype)
            if index not in self._verified:
                self._verified[index] = np.zeros(-(-size // BLOCK_BYTES), bool)
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return tokens

    def _span(self, index: int, start: int, end: int) -> np.ndarray:
        """A view of tokens [start, end) of one shard, its blocks compared with their checksums at first touch."""
        tokens = self._open.get(index)
        if tokens is None or len(self.shards) > self._max_open:
            tokens = self._shard(index)
        verified = self._verified[index]
        item = self.dtype.itemsize
        for block in range(start * item // BLOCK_BYTES, (end * item - 1) // BLOCK_BYTES + 1):
            if not verified[block]:
                a, b = block * BLOCK_BYTES // item, (block + 1) * BLOCK_BYTES // item
                expected = int(self.shards[index]["block_crc32"][8 * block : 8 * block + 8], 16)
                if zlib.crc32(tokens[a:b].data) != expected:
                    raise UserError(
                        f"token shard {self._path(index)} is damaged between tokens {a} and {b}: "
                        f"checksum differs from the manifest; {_MEND}"
                    )
                verified[block] = True
        return tokens[start:end]

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
            tokens = self._shard(index)[local : local + end - start]
            if tokens.size and tokens.max() >= self.vocab_size:
                offset = int(np.argmax(tokens >= self.vocab_size))
                raise UserError(
                    f"token shard {self._path(index)} holds id {tokens[offset]} at offset {local + offset}, "
                    f"outside the vocabulary of {self.vocab_size}; {_MEND}"
                )
