"""Train, validation and test by content: a hash decides, and near copies follow one another."""

from collections.abc import Callable

import numpy as np

from llmjax.config import UserError
from llmjax.data import minhash
from llmjax.data.config import SplitConfig

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
NONE = 255  # of a document whose record names no split
SIMILAR = 0.7  # fraction of equal signature values from which two texts are near copies
_MAX_LEADERS = 64
_GATHER = 1 << 14  # signatures compared at a time: 7 MB on each side


def check(config: SplitConfig) -> None:
    """Raises UserError for fractions that are no fractions or leave nothing to train on."""
    for name in ("validation", "test"):
        if not 0 <= (value := getattr(config, name)) < 1:
            raise UserError(f"data.split.{name}={value}: expected a fraction from 0 up to below 1")
    if config.validation + config.test >= 1:
        raise UserError(
            f"data.split.validation={config.validation} and data.split.test={config.test} leave nothing to train on; "
            "their sum must be below 1"
        )


def near_copies(keys: np.ndarray, gather: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The key of each document's cluster of near copies: uint64 [documents], the smallest key among its members.

    keys     uint64 [documents], from the content hash; exact copies share theirs, and so their cluster
    gather   signatures of the documents with the given indices, uint32 [indices, minhash.SIZE]

    Documents that share a band of their signatures are compared with the group's first, and those unlike it again
    among themselves, up to 64 rounds: beyond that many unlike members a band says nothing.

    Adding documents moves an old one only when a near copy of it comes in with a smaller key, or one that joins its
    cluster to another; all others keep their cluster's key, and so their split.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    parent = np.arange(len(first))
    for band in range(minhash.BANDS):
        groups = np.concatenate(
            [minhash.band_keys(gather(first[i : i + _GATHER]), band) for i in range(0, len(first), _GATHER)]
        )
        members = np.arange(len(first))
        for _ in range(_MAX_LEADERS):
            members, leaders = _paired(members, groups[members])
            if not members.size:
                break
            similar = _similar(first[members], first[leaders], gather)
            for a, b in zip(members[similar].tolist(), leaders[similar].tolist(), strict=True):
                _join(parent, a, b)
            members = members[~similar]
    # `unique` sorted the keys, so the smallest index of a cluster is its smallest key.
    roots = np.array([_root(parent, i) for i in range(len(first))], np.int64)
    return keys[first[roots]][inverse]


def _paired(members: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(members, leaders): each member of a group but its first, and that first."""
    order = np.argsort(groups, kind="stable")
    members, groups = members[order], groups[order]
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]])) if groups.size else np.zeros(0, int)
    leaders = np.repeat(members[starts], np.diff(np.concatenate([starts, [groups.size]])))
    others = members != leaders
    return members[others], leaders[others]


def _similar(left: np.ndarray, right: np.ndarray, gather: Callable) -> np.ndarray:
    parts = [np.zeros(0, bool)]
    for i in range(0, len(left), _GATHER):
        equal = gather(left[i : i + _GATHER]) == gather(right[i : i + _GATHER])
        parts.append(equal.mean(axis=1) >= SIMILAR)
    return np.concatenate(parts)


def _root(parent: np.ndarray, index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


def _join(parent: np.ndarray, a: int, b: int) -> None:
    a, b = _root(parent, a), _root(parent, b)
    parent[max(a, b)] = min(a, b)


def assign(keys: np.ndarray, config: SplitConfig) -> np.ndarray:
    """uint8 [documents]: TRAIN, VALIDATION or TEST, a function of each key alone."""
    place = keys.astype(np.float64) / 2.0**64
    splits = np.full(len(keys), TRAIN, np.uint8)
    splits[place < config.validation + config.test] = TEST
    splits[place < config.validation] = VALIDATION
    return splits


def missing(splits: np.ndarray, config: SplitConfig) -> list[int]:
    """The splits that should hold documents and hold none."""
    wanted = [TRAIN, *([VALIDATION] if config.validation else []), *([TEST] if config.test else [])]
    return [split for split in wanted if not (splits == split).any()]


def fill_missing(splits: np.ndarray, keys: np.ndarray, config: SplitConfig) -> np.ndarray:
    """`splits` with every empty one given the first cluster, by key, of the training documents, while two are left."""
    if not (splits == TRAIN).any():
        splits = np.full_like(splits, TRAIN)
    splits = splits.copy()
    for split in missing(splits, config):
        clusters = np.unique(keys[splits == TRAIN])
        if len(clusters) > 1:
            splits[keys == clusters[0]] = split
    return splits
