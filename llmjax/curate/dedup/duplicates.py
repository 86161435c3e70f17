"""Exact and near-duplicates: cluster them and keep one document per cluster.

Documents that share a band of their MinHash signatures are compared, and similar ones are joined into clusters. The
values are divided into bands twice, by rows and by columns: texts of Jaccard similarity 0.68 share a band with
probability 0.70 instead of 0.48, texts of 0.85 with 0.999 instead of 0.989.

The first document of a cluster is kept (decide.py ranks them), and only documents similar to a kept one are dropped:
both ends of a chain of small changes are kept. The result does not depend on the order of files or on the workers.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from llmjax.curate.config import DuplicatesConfig
from llmjax.curate.engine.measurements import Measurement
from llmjax.curate.engine.runners import Exchange
from llmjax.data.hashing import GOLDEN_GAMMA
from llmjax.data.store import minhash, near_duplicates

_PARTITIONS = 32  # of the band keys; one process sorts one partition at a time
_COLUMN_ORDER = np.arange(minhash.SIZE).reshape(minhash.ROWS, minhash.BANDS).T.ravel()  # a band: every 14th value
_ROW = np.dtype([("key", "<u8"), ("rank", "<i8"), ("index", "<i8")])


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Documents that may be copies.

    content_hash  uint64 [documents, 2], equal for exact copies
    rank          int64 [documents], a permutation: of two copies the one of lower rank is kept
    is_active     bool [documents]: no earlier stage dropped it
    is_protected  bool [documents]: it is dropped only as an exact copy
    """

    content_hash: np.ndarray
    rank: np.ndarray
    is_active: np.ndarray
    is_protected: np.ndarray


@dataclasses.dataclass(frozen=True)
class Copies:
    """Which documents are copies.

    representative  int64 [documents]: the kept document that it is a copy of; itself if it is kept
    cluster         int64 [documents]: the document of the lowest rank in its cluster
    is_exact        bool [documents]: its text equals the representative's, except for letter case and spacing
    """

    representative: np.ndarray
    cluster: np.ndarray
    is_exact: np.ndarray


def find_copies(
    documents: Candidates,
    measurements: Sequence[Measurement],
    offsets: np.ndarray,
    config: DuplicatesConfig,
    exchange: Exchange,
) -> Copies:
    """Find copies among the active documents. measurements[i] has the documents offsets[i] to offsets[i + 1] - 1."""
    rank, is_active, count = documents.rank, documents.is_active, len(documents.rank)
    pairs = [_find_exact_pairs(documents)] if config.exact else []
    signatures = near_duplicates.Signatures([measurement.read_signatures for measurement in measurements], offsets)
    if config.near:
        tasks = []
        for measurement, begin, end in zip(measurements, offsets[:-1], offsets[1:], strict=True):
            tasks.append((measurement, int(begin), is_active[begin:end], rank[begin:end]))
        pairs += exchange(_hash_bands, tasks, _find_similar_pairs, (signatures, config.similarity))
    labels = near_duplicates.find_clusters(np.concatenate([np.zeros((0, 2), np.int64), *pairs]), count)
    first = _find_lowest_ranks(labels, rank, count)
    copies = Copies(np.arange(count), first[labels], np.zeros(count, bool))
    members = np.flatnonzero(np.bincount(labels, minlength=count)[labels] > 1)
    members = members[np.lexsort((rank[members], labels[members]))]
    starts = np.flatnonzero(np.diff(labels[members], prepend=-1))
    for group in np.split(members, starts[1:]) if members.size else []:
        _choose_representatives(group, documents, signatures, config, copies)
    return copies


def _find_exact_pairs(documents: Candidates) -> np.ndarray:
    """int64 [pairs, 2]: each exact copy and the document of the lowest rank with the same text."""
    hashes, rows = documents.content_hash, np.flatnonzero(documents.is_active)
    order = rows[np.lexsort((documents.rank[rows], hashes[rows, 1], hashes[rows, 0]))]
    is_copy = np.zeros(len(order), bool)
    is_copy[1:] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    firsts = order[np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(order))))] if len(order) else order
    return np.stack([order[is_copy], firsts[is_copy]], axis=1)


def _hash_bands(measurement: Measurement, begin: int, is_active: np.ndarray, rank: np.ndarray) -> dict[int, np.ndarray]:
    """The keys of a unit's documents in every band, by partition."""
    active_rows, signatures = np.flatnonzero(is_active), measurement.read_signatures()
    parts = []
    for start in range(0, len(active_rows), near_duplicates.GATHER):
        rows = active_rows[start : start + near_duplicates.GATHER]
        block = signatures[rows]
        for division, values in enumerate((block, block[:, _COLUMN_ORDER])):
            for band in range(minhash.BANDS):
                part = np.empty(len(rows), _ROW)
                # The salt makes equal values of different bands differ.
                salt = GOLDEN_GAMMA * (division * minhash.BANDS + band + 1) & (1 << 64) - 1
                part["key"] = minhash.hash_band(values, band) ^ np.uint64(salt)
                part["rank"], part["index"] = rank[rows], rows + begin
                parts.append(part)
    rows = np.concatenate([np.empty(0, _ROW), *parts])
    partition = (rows["key"] >> np.uint64(40)) % np.uint64(_PARTITIONS)
    return {int(p): rows[partition == p] for p in np.unique(partition)}


def _find_similar_pairs(rows: np.ndarray, signatures: near_duplicates.Signatures, similarity: float) -> np.ndarray:
    """int64 [pairs, 2]: documents that share a key and are similar, each with the first document it is similar to."""
    _, inverse, counts = np.unique(rows["key"], return_inverse=True, return_counts=True)
    rows = rows[counts[inverse] > 1]
    rows = rows[np.argsort(rows["rank"])]
    return np.unique(near_duplicates.find_pairs(rows["index"], rows["key"], signatures, similarity), axis=0)


def _find_lowest_ranks(labels: np.ndarray, rank: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: the document of the lowest rank with each label; 0 for unused labels."""
    by_rank = np.empty(count, np.int64)
    by_rank[rank] = np.arange(count)
    first = np.zeros(count, np.int64)
    first[labels[by_rank[::-1]]] = by_rank[::-1]
    return first


def _choose_representatives(
    group: np.ndarray,
    documents: Candidates,
    signatures: near_duplicates.Signatures,
    config: DuplicatesConfig,
    copies: Copies,
) -> None:
    """Fill `copies` for a cluster in rank order: keep the first, drop the documents similar to it, and repeat."""
    hashes = documents.content_hash
    while len(group) > 1:
        kept, rest = group[0], group[1:]
        is_exact = (hashes[rest] == hashes[kept]).all(axis=1) if config.exact else np.zeros(len(rest), bool)
        is_copy = is_exact
        if config.near:
            is_near = signatures.similarity(rest, np.full(len(rest), kept)) >= config.similarity
            is_copy = is_exact | (is_near & ~documents.is_protected[rest])
        copies.representative[rest[is_copy]] = kept
        copies.is_exact[rest[is_exact]] = True
        group = rest[~is_copy]
