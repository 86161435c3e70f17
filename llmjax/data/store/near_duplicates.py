"""Near-duplicates: documents that share a band of their MinHash signatures are compared and clustered."""

from collections.abc import Callable, Sequence

import numpy as np

from llmjax.data.store import minhash

GATHER = 1 << 14  # signatures worked on at a time: 7 MB on each side
_MAX_LEADERS = 64  # rounds, beyond which a band of many unlike texts says nothing


class Signatures:
    """Signatures of documents that are numbered over all parts.

    parts    of each, what reads its signatures, uint32 [documents of the part, minhash.SIZE]; called once, if at all
    edges    int64 [parts + 1]: the documents of parts[i] are edges[i] up to edges[i + 1]
    """

    def __init__(self, parts: Sequence[Callable[[], np.ndarray]], edges: np.ndarray):
        self._parts, self._edges = parts, edges
        self._read: dict[int, np.ndarray] = {}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """uint32 [indices, minhash.SIZE]"""
        owners = np.searchsorted(self._edges, indices, "right") - 1
        rows = np.empty((len(indices), minhash.SIZE), np.uint32)
        for owner in np.unique(owners).tolist():
            if owner not in self._read:
                self._read[owner] = self._parts[owner]()
            mine = owners == owner
            rows[mine] = self._read[owner][indices[mine] - self._edges[owner]]
        return rows

    def similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """float [pairs]: the fraction of equal values, an estimate of the Jaccard similarity of the shingles."""
        parts = [np.zeros(0)]
        for start in range(0, len(left), GATHER):
            equal = self[left[start : start + GATHER]] == self[right[start : start + GATHER]]
            parts.append(equal.mean(axis=1))
        return np.concatenate(parts)


def pairs(members: np.ndarray, groups: np.ndarray, signatures: Signatures, similarity: float) -> np.ndarray:
    """int64 [pairs, 2]: documents of one group that are alike, each with the first of the group that it is alike to.

    members, groups    [memberships]: documents, in the order that makes one of them first, and the groups they are in

    All are compared with their group's first, and those unlike it again among themselves, up to 64 rounds.
    """
    order = np.argsort(groups, kind="stable")
    members, groups = members[order], groups[order]
    found = [np.zeros((0, 2), np.int64)]
    for _ in range(_MAX_LEADERS):
        if not len(members):
            break
        starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
        leaders = np.repeat(members[starts], np.diff(np.append(starts, len(members))))
        others = members != leaders
        members, groups, leaders = members[others], groups[others], leaders[others]
        alike = signatures.similarity(members, leaders) >= similarity
        found.append(np.stack([members[alike], leaders[alike]], axis=1))
        members, groups = members[~alike], groups[~alike]
    return np.concatenate(found)


def clusters(joined: np.ndarray, count: int) -> np.ndarray:
    """int64 [documents]: the smallest of all documents that the pairs, int64 [pairs, 2], connect with each."""
    import scipy.sparse

    ones = np.ones(len(joined), np.int8)
    graph = scipy.sparse.coo_array((ones, (joined[:, 0], joined[:, 1])), shape=(count, count))
    labels = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
    _, first = np.unique(labels, return_index=True)
    return first[labels]
