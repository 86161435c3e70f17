"""Near-duplicates: documents that share a band of their MinHash signatures are compared and clustered."""

from collections.abc import Callable, Sequence

import numpy as np

from llmjax.data.store import minhash

GATHER = 1 << 14  # signatures that are compared at a time: 7 MB on each side
_MAX_ROUNDS = 64  # after so many, the remaining documents of a group have too little in common


class Signatures:
    """Signatures of documents that are stored in parts and numbered across all of them.

    loaders  of each part, loads its signatures, uint32 [documents of the part, minhash.SIZE]; called once, if at all
    edges    int64 [parts + 1]: the documents of part i are edges[i] up to edges[i + 1]
    """

    def __init__(self, loaders: Sequence[Callable[[], np.ndarray]], edges: np.ndarray):
        self._loaders, self._edges = loaders, edges
        self._loaded: dict[int, np.ndarray] = {}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The signatures of these documents: uint32 [indices, minhash.SIZE]."""
        parts = np.searchsorted(self._edges, indices, "right") - 1
        rows = np.empty((len(indices), minhash.SIZE), np.uint32)
        for part in np.unique(parts).tolist():
            if part not in self._loaded:
                self._loaded[part] = self._loaders[part]()
            selected = parts == part
            rows[selected] = self._loaded[part][indices[selected] - self._edges[part]]
        return rows

    def similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Estimate the Jaccard similarity of the shingles of pairs by the fraction of equal values: float [pairs]."""
        parts = [np.zeros(0)]
        for start in range(0, len(left), GATHER):
            equal = self[left[start : start + GATHER]] == self[right[start : start + GATHER]]
            parts.append(equal.mean(axis=1))
        return np.concatenate(parts)


def find_pairs(members: np.ndarray, groups: np.ndarray, signatures: Signatures, similarity: float) -> np.ndarray:
    """Find similar documents of the same group: int64 [pairs, 2], each with the first of the group that it resembles.

    members, groups    [memberships]: documents, the first of a group first, and the groups that they belong to
    similarity         from which two documents are similar

    Every round compares all members with the first of their group; those that differ from it go to the next round.
    """
    order = np.argsort(groups, kind="stable")
    members, groups = members[order], groups[order]
    similar = [np.zeros((0, 2), np.int64)]
    for _ in range(_MAX_ROUNDS):
        if not len(members):
            break
        starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
        leaders = np.repeat(members[starts], np.diff(np.append(starts, len(members))))
        others = members != leaders
        members, groups, leaders = members[others], groups[others], leaders[others]
        alike = signatures.similarity(members, leaders) >= similarity
        similar.append(np.stack([members[alike], leaders[alike]], axis=1))
        members, groups = members[~alike], groups[~alike]
    return np.concatenate(similar)


def find_clusters(pairs: np.ndarray, count: int) -> np.ndarray:
    """Cluster documents connected by pairs, int64 [pairs, 2]: the smallest of each cluster, int64 [documents]."""
    import scipy.sparse

    ones = np.ones(len(pairs), np.int8)
    graph = scipy.sparse.coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
    _, first = np.unique(labels, return_index=True)
    return first[labels]
