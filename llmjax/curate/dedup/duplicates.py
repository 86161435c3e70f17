"""Exact and near-duplicates: cluster them and keep one document per cluster.

Documents that share a band of their MinHash signatures are compared; similar ones are joined into clusters. The values
are cut into bands twice, by rows and by columns: texts of Jaccard similarity 0.68 share a band with probability 0.70
instead of 0.48, of 0.85 with 0.999 instead of 0.989.

The first document of a cluster is kept (decide.py orders them), and only documents similar to a kept one are dropped:
both ends of a chain of small changes are kept. The result depends on no order of files and no number of workers.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import numpy as np

from llmjax.curate.config import DuplicatesConfig
from llmjax.curate.engine.measurements import Measurement
from llmjax.curate.engine.runners import Runner
from llmjax.data.hashing import GOLDEN_GAMMA
from llmjax.data.store import minhash, near_duplicates

_PARTITIONS = 32  # of the band keys: each is sorted by one process at a time
_COLUMN_ORDER = np.arange(minhash.SIZE).reshape(minhash.ROWS, minhash.BANDS).T.ravel()  # a band: every 14th value
_ROW = np.dtype([("key", "<u8"), ("rank", "<i8"), ("index", "<i8")])


@dataclasses.dataclass(frozen=True)
class Copies:
    """Which documents are copies.

    kept_as  int64 [documents]: the document that is kept instead of this one; itself if it is kept
    cluster  int64 [documents]: the first document, by rank, of the cluster
    exact    bool [documents]: dropped because its text equals the kept one, letter case and spacing aside
    """

    kept_as: np.ndarray
    cluster: np.ndarray
    exact: np.ndarray


def find(
    content: np.ndarray,
    rank: np.ndarray,
    alive: np.ndarray,
    protected: np.ndarray,
    measurements: Sequence[Measurement],
    edges: np.ndarray,
    config: DuplicatesConfig,
    runner: Runner,
    folder: Path,
) -> Copies:
    """Find copies among the documents that no earlier stage dropped.

    content    uint64 [documents, 2], equal for exact copies
    rank       int64 [documents], a permutation: of two copies the lower is kept
    alive      bool [documents]: no earlier stage dropped it
    protected  bool [documents]: dropped only as an exact copy
    edges      int64 [units + 1]: the documents of measurements[i] are edges[i] up to edges[i + 1]
    folder     where the runner's tasks exchange data
    """
    count = len(rank)
    pairs = [_exact_pairs(content, rank, alive)] if config.exact else []
    signatures = near_duplicates.Signatures([measurement.read_signatures for measurement in measurements], edges)
    if config.near:
        tasks = []
        for measurement, begin, end in zip(measurements, edges[:-1], edges[1:], strict=True):
            tasks.append((measurement, int(begin), alive[begin:end], rank[begin:end]))
        pairs += list(runner.exchange(_band_keys, tasks, _similar_pairs, (signatures, config.similarity), folder))
    labels = near_duplicates.find_clusters(np.concatenate([np.zeros((0, 2), np.int64), *pairs]), count)
    kept_as, exact = np.arange(count), np.zeros(count, bool)
    first = _first_by_rank(labels, rank, count)
    members = np.flatnonzero(np.bincount(labels, minlength=count)[labels] > 1)
    members = members[np.lexsort((rank[members], labels[members]))]
    starts = np.flatnonzero(np.diff(labels[members], prepend=-1))
    for group in np.split(members, starts[1:]) if members.size else []:
        _keep_first(group, content, protected, signatures, config, kept_as, exact)
    return Copies(kept_as, first[labels], exact)


def _exact_pairs(content: np.ndarray, rank: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: each exact copy and the first of its kind."""
    chosen = np.flatnonzero(alive)
    order = chosen[np.lexsort((rank[chosen], content[chosen, 1], content[chosen, 0]))]
    same = np.zeros(len(order), bool)
    same[1:] = (content[order[1:]] == content[order[:-1]]).all(axis=1)
    firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))] if len(order) else order
    return np.stack([order[same], firsts[same]], axis=1)


def _band_keys(measurement: Measurement, begin: int, alive: np.ndarray, rank: np.ndarray) -> dict[int, np.ndarray]:
    """The keys of a unit's documents in every band, by partition."""
    chosen, signatures = np.flatnonzero(alive), measurement.read_signatures()
    parts = []
    for start in range(0, len(chosen), near_duplicates.GATHER):
        rows = chosen[start : start + near_duplicates.GATHER]
        block = signatures[rows]
        for cut, values in enumerate((block, block[:, _COLUMN_ORDER])):
            for band in range(minhash.BANDS):
                part = np.empty(len(rows), _ROW)
                # Mixed with the band, so that equal keys of different bands differ.
                salt = GOLDEN_GAMMA * (cut * minhash.BANDS + band + 1) & (1 << 64) - 1
                part["key"] = minhash.hash_band(values, band) ^ np.uint64(salt)
                part["rank"], part["index"] = rank[rows], rows + begin
                parts.append(part)
    rows = np.concatenate([np.empty(0, _ROW), *parts])
    partition = (rows["key"] >> np.uint64(40)) % np.uint64(_PARTITIONS)
    return {int(p): rows[partition == p] for p in np.unique(partition)}


def _similar_pairs(rows: np.ndarray, signatures: near_duplicates.Signatures, similarity: float) -> np.ndarray:
    """int64 [pairs, 2]: documents that share a key and are similar, each with the first one it is similar to."""
    _, inverse, counts = np.unique(rows["key"], return_inverse=True, return_counts=True)
    rows = rows[counts[inverse] > 1]
    rows = rows[np.argsort(rows["rank"])]
    return np.unique(near_duplicates.find_pairs(rows["index"], rows["key"], signatures, similarity), axis=0)


def _first_by_rank(labels: np.ndarray, rank: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: the document of the lowest rank with each label; 0 for unused labels."""
    by_rank = np.empty(count, np.int64)
    by_rank[rank] = np.arange(count)
    first = np.zeros(count, np.int64)
    first[labels[by_rank[::-1]]] = by_rank[::-1]
    return first


def _keep_first(
    group: np.ndarray,
    content: np.ndarray,
    protected: np.ndarray,
    signatures: near_duplicates.Signatures,
    config: DuplicatesConfig,
    kept_as: np.ndarray,
    exact: np.ndarray,
) -> None:
    """Fill `kept_as` and `exact` for a cluster: keep the first by rank, drop what is similar to it, and repeat."""
    while len(group) > 1:
        kept, rest = group[0], group[1:]
        same = (content[rest] == content[kept]).all(axis=1) if config.exact else np.zeros(len(rest), bool)
        is_copy = same
        if config.near:
            near_copies = signatures.similarity(rest, np.full(len(rest), kept)) >= config.similarity
            is_copy = same | (near_copies & ~protected[rest])
        kept_as[rest[is_copy]] = kept
        exact[rest[same]] = True
        group = rest[~is_copy]
