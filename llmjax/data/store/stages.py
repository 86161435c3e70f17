"""The stages of preparation for one unit, run by worker processes: scan, sample, tokenize. No device code."""

from collections import Counter
from collections.abc import Iterator, Sequence
import dataclasses
import errno
import functools
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path
from typing import Any, NamedTuple
import zlib

import numpy as np

from llmjax.atomic import write_bytes
from llmjax.data.chat_template import RefusedDialogueError
from llmjax.data.readers.documents import NO_FAULT, Document, Reject, read_unit
from llmjax.data.readers.records import EXCERPT
from llmjax.data.readers.sources import Unit
from llmjax.data.store import minhash
from llmjax.data.store.chat import ChatFormat
from llmjax.data.store.record_texts import RecordFormat
from llmjax.data.store.shards import read_shard_info, write_shard
from llmjax.data.store.split import NONE, SPLITS, TRAIN, VALIDATION
from llmjax.data.store.tokenizer import Tokenizer, read_tokenizer_file
from llmjax.data.store.tokenizer_kinds import split_text
from llmjax.data.store.tokenizer_training import train_sentencepiece
from llmjax.errors import UserError
from llmjax.run.workdir import read_json

_BATCH_BYTES = 1 << 20  # of text that is tokenized at once


class Scan(NamedTuple):
    """What `scan` stores about the documents of a unit.

    hashes        uint64 [documents, 2], of the content
    sizes         int64 [documents], UTF-8 bytes
    named_splits  uint8 [documents], the split that a record names, or split.NONE
    rejects       reason -> count
    """

    hashes: np.ndarray
    sizes: np.ndarray
    named_splits: np.ndarray
    rejects: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ScratchDir:
    """The folder of an unfinished preparation: what a stage leaves for the next ones, by unit."""

    folder: Path

    def path(self, kind: str, unit: Unit, suffix: str = "") -> Path:
        """The file of one kind for one unit."""
        return self.folder / f"{kind}-{unit.source}-{unit.index:05d}{suffix}"

    def find_result(self, stage: str, unit: Unit) -> dict[str, Any] | None:
        """What a stage recorded when it finished a unit, None if it did not finish."""
        try:
            return read_json(self.path(stage, unit, ".json"))
        except UserError:
            return None

    def result(self, stage: str, unit: Unit) -> dict[str, Any]:
        """What a finished stage recorded. Raises FileNotFoundError if it is gone."""
        path = self.path(stage, unit, ".json")
        if (record := read_json(path)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return record

    def save_result(self, stage: str, unit: Unit, record: dict[str, Any]) -> None:
        """Record that a stage has finished a unit."""
        _require_folder(self.folder)
        write_bytes(self.path(stage, unit, ".json"), json.dumps(record).encode())

    def load_scan(self, unit: Unit) -> Scan:
        """Load what `scan` stored."""
        arrays = [np.load(self.path(name, unit, ".npy")) for name in Scan._fields[:3]]
        return Scan(*arrays, rejects=self.result("scan", unit)["rejects"])

    def load_signatures(self, unit: Unit) -> np.ndarray:
        """uint32 [documents, minhash.SIZE], memory-mapped; only if near-duplicates are looked for."""
        return np.load(self.path("signatures", unit, ".npy"), mmap_mode="r")

    def load_splits(self, unit: Unit) -> np.ndarray:
        """uint8 [documents]: the split of each document."""
        return np.load(self.path("splits", unit, ".npy"))


def _require_folder(folder: Path) -> None:
    """Raise FileNotFoundError if a folder of the store is gone: writing a file would create it again, empty."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """What the documents of a store have besides text.

    records  how records with labels or several texts are stored; None: there are none
    chat     how dialogues become text; None: there are none
    """

    records: RecordFormat | None = None
    chat: ChatFormat | None = None


def scan(unit: Unit, scratch: ScratchDir, part_bytes: int | None, near_copies: bool, form: Formats) -> int:
    """Hash every document, record every reject, and return the bytes of text. Does nothing if it was done before.

    part_bytes    size of the parts that documents are cut into; None: they are not
    near_copies   compute MinHash signatures too
    form          records are checked, and dialogues are rendered: one that the template refuses is a reject
    """
    result = scratch.find_result("scan", unit)
    if result and result["part_bytes"] == part_bytes:
        return result["bytes"]
    hashes, sizes, signatures, named_splits, rejects, bad_bytes = [], [], [], [], {}, 0
    refused, dialogues = [], Counter()
    with open(scratch.path("rejects", unit, ".jsonl"), "w") as file:
        for record in read_unit(unit, part_bytes):
            if isinstance(record, Document) and record.dialogue:
                dialogues[record.dialogue.format] += 1
                if reject := _find_refusal(record, form.chat):
                    refused.append(len(hashes) + len(refused))
                    record = reject
            if isinstance(record, Reject):
                rejects[record.reason] = rejects.get(record.reason, 0) + 1
                bad_bytes += record.size if record.reason not in NO_FAULT else 0
                line = {"source": unit.source, "where": record.id, "reason": record.reason, "excerpt": record.excerpt}
                file.write(json.dumps(line) + "\n")
            else:
                hashes.append(hashlib.sha256(record.data).digest()[:16])
                sizes.append(len(record.data))
                named_splits.append(SPLITS.index(record.split) if record.split else NONE)
                if form.records is not None:
                    form.records.check(record)
                if near_copies:
                    signatures.append(minhash.compute_signature(record.data))
    arrays = {
        "hashes": np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64).reshape(-1, 2),
        "sizes": np.array(sizes, np.int64),
        "named_splits": np.array(named_splits, np.uint8),
    }
    if near_copies:
        arrays["signatures"] = np.array(signatures, np.uint32).reshape(-1, minhash.SIZE)
    for name, array in arrays.items():
        np.save(scratch.path(name, unit, ".npy"), array)
    result = {"part_bytes": part_bytes, "bytes": sum(sizes), "rejects": rejects, "bad_bytes": bad_bytes}
    if dialogues:
        result |= {"dialogues": dict(dialogues), "refused": refused}
    scratch.save_result("scan", unit, result)
    return sum(sizes)


def _find_refusal(document: Document, chat: ChatFormat | None) -> Reject | None:
    """The reject of a dialogue that the chat template refuses; None if it does not."""
    assert chat is not None and document.dialogue is not None
    try:
        chat.render(document.dialogue, document.id)
    except RefusedDialogueError as error:
        reason = str(error).removeprefix(f"{chat.template.where}: ")[:EXCERPT]
        return Reject(document.id, reason, repr(document.text)[:EXCERPT], len(document.data))
    return None


def read_split(unit: Unit, scratch: ScratchDir, split: int) -> Iterator[tuple[int, Document]]:
    """Yield (index in the unit, document) of one split. Raises UserError if the unit changed since it was scanned."""
    splits, result, index = scratch.load_splits(unit), scratch.result("scan", unit), 0
    refused = set(result.get("refused", ()))  # among the documents, those that `scan` rejected
    documents = (record for record in read_unit(unit, result["part_bytes"]) if isinstance(record, Document))
    for number, document in enumerate(documents):
        if number not in refused:
            if index < len(splits) and splits[index] == split:
                yield index, document
            index += 1
    if index != len(splits):
        where = f"data.sources.{unit.source}: {unit.items[0].path}"
        raise UserError(f"{where} changed while it was read; run prepare again")


def sample(unit: Unit, scratch: ScratchDir, fraction: float) -> None:
    """Write a fraction of the unit's training text, as spans of a few KiB chosen by a hash, for the tokenizer."""
    hashes = scratch.load_scan(unit).hashes[:, 1]
    with open(scratch.path("sample", unit), "wb") as file:
        for index, document in read_split(unit, scratch, TRAIN):
            for number, span in enumerate(split_text(document.text)):
                if zlib.crc32(b"%d:%d" % (hashes[index], number)) < fraction * (1 << 32):
                    file.write(span.encode())


def train_tokenizer(units: list[Unit], scratch: ScratchDir, algorithm: str, vocab_size: int) -> bytes:
    """Train a SentencePiece model on what `sample` chose, in the order of the units."""
    texts = (scratch.path("sample", unit).read_bytes().decode() for unit in units)
    return train_sentencepiece(texts, algorithm=algorithm, vocab_size=vocab_size)


_read_tokenizer_once = functools.cache(read_tokenizer_file)  # a worker tokenizes many units


def tokenize(unit: Unit, scratch: ScratchDir, kind: str, model: Path, folder: Path, form: Formats) -> None:
    """Write the unit's shard of every split below `folder`, and record the shards' infos, the lossy documents and the
    number of records that were cut."""
    result, tokenizer = scratch.find_result("tokens", unit), _read_tokenizer_once(kind, model)
    if result is not None and result["tokenizer_sha256"] == tokenizer.sha256:
        infos = {split: read_shard_info(folder / split, unit.index) for split in result["shards"]}
        if infos == result["shards"]:
            return
    _require_folder(folder)
    splits, sizes = scratch.load_splits(unit), scratch.load_scan(unit).sizes
    shards, lossy, cut = {}, [], []
    for number, split in enumerate(SPLITS):
        if (splits == number).any():
            documents = (document for _, document in read_split(unit, scratch, number))
            labels: list[np.ndarray] | None = None if form.records is None else []
            if unit.config.chat:
                assert form.chat is not None
                encoded = _encode_dialogues(documents, tokenizer, form.chat)
            elif form.records is None:
                encoded = _encode(documents, tokenizer, lossy)
            else:
                encoded = _encode_records(documents, tokenizer, lossy, cut, form.records, labels)
            shards[split] = write_shard(
                folder / split,
                unit.index,
                encoded,
                vocab_size=tokenizer.vocab_size,
                text_bytes=int(sizes[splits == number].sum()),
                tokenizer_sha256=tokenizer.sha256,
                labels=labels,
                has_marks=bool(unit.config.chat),
            )
    result = {"tokenizer_sha256": tokenizer.sha256, "shards": shards, "lossy": len(lossy), "first_lossy": lossy[:1]}
    result["cut"] = sum(cut)
    scratch.save_result("tokens", unit, result)


def _encode(documents: Iterator[Document], tokenizer: Tokenizer, lossy: list[str]) -> Iterator[np.ndarray]:
    """Yield token ids and EOS of every document; append the ids of documents that decode to another text to `lossy`."""
    for batch in _batches(documents):
        for ids in _encode_texts(batch, [document.text for document in batch], tokenizer, lossy):
            yield np.append(ids, np.int32(tokenizer.eos_id))


def _encode_dialogues(documents: Iterator[Document], tokenizer: Tokenizer, chat: ChatFormat) -> Iterator[np.ndarray]:
    """Yield the token ids of every dialogue, as its template writes them, with marks on those that are scored."""
    for document in documents:
        assert document.dialogue is not None
        yield chat.encode(chat.render(document.dialogue, document.id), tokenizer)


def _encode_records(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    lossy: list[str],
    cut: list[bool],
    record_format: RecordFormat,
    labels: list[np.ndarray] | None,
) -> Iterator[np.ndarray]:
    """The same of records, as their format has it; append to `labels`, and to `cut` whether one was cut."""
    assert labels is not None
    for batch in _batches(documents):
        encode_texts = functools.partial(_encode_texts, batch, tokenizer=tokenizer, lossy=lossy)
        for ids, label, is_cut in record_format.encode(batch, encode_texts, tokenizer):
            cut.append(is_cut)
            labels.append(label)
            yield ids


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """The documents in lists of about _BATCH_BYTES."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _encode_texts(
    batch: list[Document], texts: Sequence[str], tokenizer: Tokenizer, lossy: list[str]
) -> Iterator[np.ndarray]:
    """Yield the token ids of one text of each document; append the ids of documents that lose text to `lossy`."""
    for document, text, ids in zip(batch, texts, tokenizer.encode_batch(list(texts)), strict=True):
        if tokenizer.decode(ids) != text and document.id not in lossy[-1:]:
            lossy.append(document.id)
        yield ids


def compress(units: list[Unit], scratch: ScratchDir) -> dict[str, dict[str, int]]:
    """Bytes that gzip -9 and xz -9 need for the validation text: document by document, and concatenated."""
    texts = [document.data for unit in units for _, document in read_split(unit, scratch, VALIDATION)]
    concatenated = b"".join(texts)
    return {
        name: {"per_document": sum(len(run(text)) for text in texts), "concatenated": len(run(concatenated))}
        for name, run in (("gzip -9", _gzip), ("xz -9", _xz))
    }


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 9)


def _xz(data: bytes) -> bytes:
    """xz -9 with a window no larger than the data: the same bytes, without 700 MB of memory for each document."""
    window = min(max(1 << (len(data) - 1).bit_length(), 4096), 1 << 26) if data else 4096
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}])
