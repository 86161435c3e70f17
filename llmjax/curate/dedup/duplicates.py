"""Exact and near-duplicates: cluster them and keep one document per cluster.

Documents that share a band of their MinHash signatures are compared; those alike are joined into clusters. Bands are
cut twice from the same values, along them and across: texts of Jaccard similarity 0.68 meet with probability 0.70
instead of 0.48, of 0.85 with 0.999 instead of 0.989.

Of a cluster its first document stays (decide.py says which that is), and only what is alike to one that stays goes: a
chain of small changes keeps both of its ends. No order of files and no number of workers matters.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import numpy as np

from llmjax.curate.config import DuplicatesConfig
from llmjax.curate.engine.measurements import Measured
from llmjax.curate.engine.runners import Runner
from llmjax.data.store import minhash, near_duplicates

_PARTITIONS = 32  # of the band keys: each is sorted by one process at a time
_ACROSS = np.arange(minhash.SIZE).reshape(minhash.ROWS, minhash.BANDS).T.ravel()  # a band: every 14th value
_ROW = np.dtype([("key", "<u8"), ("rank", "<i8"), ("index", "<i8")])


@dataclasses.dataclass(frozen=True)
class Copies:
    """kept_as  int64 [documents]: the document that stays in this one's place; itself where it stays
    cluster     int64 [documents]: the first document, by rank, of the cluster
    exact       bool [documents]: goes because its text is that of the one that stays, case and spacing aside
    """

    kept_as: np.ndarray
    cluster: np.ndarray
    exact: np.ndarray


def find(
    content: np.ndarray,
    rank: np.ndarray,
    alive: np.ndarray,
    stays: np.ndarray,
    units: Sequence[Measured],
    edges: np.ndarray,
    config: DuplicatesConfig,
    runner: Runner,
    folder: Path,
) -> Copies:
    """Copies among the documents that are alive.

    content  uint64 [documents, 2], equal for exact copies
    rank     int64 [documents], a permutation: of two copies the lower stays
    alive    bool [documents]
    stays    bool [documents]: goes for an exact copy alone
    edges    int64 [units + 1]: the documents of units[i] are edges[i] up to edges[i + 1]
    folder   for what goes between the runner's tasks
    """
    count = len(rank)
    pairs = [_exact(content, rank, alive)] if config.exact else []
    signatures = near_duplicates.Signatures([unit.read_signatures for unit in units], edges)
    if config.near:
        tasks = []
        for unit, begin, end in zip(units, edges[:-1], edges[1:], strict=True):
            tasks.append((unit, int(begin), alive[begin:end], rank[begin:end]))
        pairs += list(runner.exchange(_bands, tasks, _pairs, (signatures, config.similarity), folder))
    labels = near_duplicates.clusters(np.concatenate([np.zeros((0, 2), np.int64), *pairs]), count)
    kept_as, exact = np.arange(count), np.zeros(count, bool)
    first = _first(labels, rank, count)
    members = np.flatnonzero(np.bincount(labels, minlength=count)[labels] > 1)
    members = members[np.lexsort((rank[members], labels[members]))]
    starts = np.flatnonzero(np.diff(labels[members], prepend=-1))
    for group in np.split(members, starts[1:]) if members.size else []:
        _choose(group, content, stays, signatures, config, kept_as, exact)
    return Copies(kept_as, first[labels], exact)


def _exact(content: np.ndarray, rank: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: each exact copy and the first of its kind."""
    chosen = np.flatnonzero(alive)
    order = chosen[np.lexsort((rank[chosen], content[chosen, 1], content[chosen, 0]))]
    same = np.zeros(len(order), bool)
    same[1:] = (content[order[1:]] == content[order[:-1]]).all(axis=1)
    firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))] if len(order) else order
    return np.stack([order[same], firsts[same]], axis=1)


def _bands(unit: Measured, begin: int, alive: np.ndarray, rank: np.ndarray) -> dict[int, np.ndarray]:
    """The keys of a unit's documents in every band, by partition."""
    chosen, signatures = np.flatnonzero(alive), unit.read_signatures()
    made = []
    for start in range(0, len(chosen), near_duplicates.GATHER):
        rows = chosen[start : start + near_duplicates.GATHER]
        block = signatures[rows]
        for cut, values in enumerate((block, block[:, _ACROSS])):
            for band in range(minhash.BANDS):
                part = np.empty(len(rows), _ROW)
                # The band is stirred in, so that equal keys of different bands do not meet.
                salt = 0x9E3779B97F4A7C15 * (cut * minhash.BANDS + band + 1) & (1 << 64) - 1
                part["key"] = minhash.band_keys(values, band) ^ np.uint64(salt)
                part["rank"], part["index"] = rank[rows], rows + begin
                made.append(part)
    rows = np.concatenate([np.empty(0, _ROW), *made])
    partition = (rows["key"] >> np.uint64(40)) % np.uint64(_PARTITIONS)
    return {int(p): rows[partition == p] for p in np.unique(partition)}


def _pairs(rows: np.ndarray, signatures: near_duplicates.Signatures, similarity: float) -> np.ndarray:
    """int64 [pairs, 2] of documents that share a key and are alike: each with the first that it is alike to."""
    _, inverse, counts = np.unique(rows["key"], return_inverse=True, return_counts=True)
    rows = rows[counts[inverse] > 1]
    rows = rows[np.argsort(rows["rank"])]
    return np.unique(near_duplicates.pairs(rows["index"], rows["key"], signatures, similarity), axis=0)


def _first(labels: np.ndarray, rank: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: the document of the lowest rank with each label; 0 where nothing has it."""
    by_rank = np.empty(count, np.int64)
    by_rank[rank] = np.arange(count)
    first = np.zeros(count, np.int64)
    first[labels[by_rank[::-1]]] = by_rank[::-1]
    return first


def _choose(group, content, stays, signatures, config: DuplicatesConfig, kept_as, exact) -> None:
    """Of a cluster, in the order of rank: the first stays, what is alike to it goes, and again with what is left."""
    while len(group) > 1:
        kept, rest = group[0], group[1:]
        same = (content[rest] == content[kept]).all(axis=1) if config.exact else np.zeros(len(rest), bool)
        alike = same
        if config.near:
            near_copies = signatures.similarity(rest, np.full(len(rest), kept)) >= config.similarity
            alike = same | (near_copies & ~stays[rest])
        kept_as[rest[alike]] = kept
        exact[rest[same]] = True
        group = rest[~alike]
