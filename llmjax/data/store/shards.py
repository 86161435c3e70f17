"""Shards of a token store: flat token ids with the offsets, labels and checksums of their documents."""

from collections.abc import Iterable
import json
from pathlib import Path
from typing import Any
import zlib

import numpy as np

from llmjax.atomic import atomic_write, write_bytes
from llmjax.data.store.checked_file import block_checksums
from llmjax.errors import UserError
from llmjax.run.workdir import read_json

# Set in the stored ids of dialogues that are scored. Ids have fewer bits, and such shards are always of four bytes.
SCORED = np.uint32(1 << 31)


def tokens_path(folder: Path, index: int) -> Path:
    """The file of a shard's token ids, flat."""
    return Path(folder) / f"tokens-{index:05d}.bin"


def offsets_path(folder: Path, index: int) -> Path:
    """The file of the offsets at which a shard's documents begin, and of its end."""
    return Path(folder) / f"offsets-{index:05d}.npy"


def labels_path(folder: Path, index: int) -> Path:
    """The file of the labels of a shard's documents, float32 [documents, width], if they have labels."""
    return Path(folder) / f"labels-{index:05d}.npy"


def info_path(folder: Path, index: int) -> Path:
    """The file of what `write_shard` returns."""
    return Path(folder) / f"shard-{index:05d}.json"


def token_dtype(vocab_size: int, *, has_marks: bool = False) -> np.dtype:
    """The stored type: two bytes where every id fits, four otherwise and with marks; little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 and not has_marks else "<u4")


def write_shard(
    folder: Path,
    index: int,
    documents: Iterable[np.ndarray],
    *,
    vocab_size: int,
    text_bytes: int,
    tokenizer_sha256: str,
    labels: list[np.ndarray] | None = None,
    has_marks: bool = False,
) -> dict[str, Any]:
    """Write one shard and return its info. The info file is written last, so a shard that has one is complete.

    documents          token ids of each document, 1-D, at least one token, EOS at the end included
    text_bytes         UTF-8 bytes of the documents' original text
    tokenizer_sha256   hash of the tokenizer that produced the ids
    labels             float32 [width] of each document, complete once `documents` was read; None: there are none
    has_marks          the ids are uint32, with the bit SCORED in those that are scored; else all are scored
    Raises ValueError for an empty document or an id outside the vocabulary. Shards are independent: any process may
    write any of them, in any order.
    """
    folder = Path(folder)
    dtype, crc, max_id, lengths, num_scored = token_dtype(vocab_size, has_marks=has_marks), 0, -1, [], 0
    with atomic_write(tokens_path(folder, index)) as file:
        for document in documents:
            document = np.asarray(document)
            if document.ndim != 1 or not document.size:
                raise ValueError(f"shard {index}, document {len(lengths)}: expected a non-empty 1-D array of token ids")
            ids = document & ~SCORED if has_marks else document
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"shard {index}, document {len(lengths)}: a token id is outside 0..{vocab_size - 1}")
            data = document.astype(dtype).tobytes()
            file.write(data)
            crc = zlib.crc32(data, crc)
            max_id = max(max_id, int(ids.max()))
            num_scored += int((document >= SCORED).sum()) if has_marks else 0
            lengths.append(document.size)
        block_crc32 = block_checksums(file)
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
        "block_crc32": block_crc32,
        "offsets_crc32": zlib.crc32(offsets.tobytes()),
        "max_id": max_id,
        "tokenizer_sha256": tokenizer_sha256,
    }
    if has_marks:
        info["scored_tokens"] = num_scored
    if labels is not None:
        stacked = np.stack(labels).astype("<f4")
        with atomic_write(labels_path(folder, index)) as file:
            np.save(file, stacked)
        info |= {"label_width": stacked.shape[1], "labels_crc32": zlib.crc32(stacked.tobytes())}
    write_bytes(info_path(folder, index), json.dumps(info).encode())
    return info


def read_shard_info(folder: Path, index: int) -> dict[str, Any] | None:
    """Return the info of a shard that was written completely and whose files have the right sizes, else None."""
    try:
        info = read_json(info_path(folder, index)) or {}
        if offsets_path(folder, index).stat().st_size < 8 * (info["documents"] + 1):
            return None
        if "label_width" in info and not labels_path(folder, index).is_file():
            return None
        return info if tokens_path(folder, index).stat().st_size == info["bytes"] else None
    except (OSError, KeyError, TypeError, UserError):
        return None
