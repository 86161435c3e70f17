"""Assign documents to train, validation and test by a hash of their content; near-duplicates share a split."""

import numpy as np

from llmjax.data.config import FractionsConfig
from llmjax.data.store import minhash, near_duplicates
from llmjax.errors import UserError

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
NONE = 255  # of a document whose record names no split
SIMILAR = 0.7  # fraction of equal signature values from which two texts are near copies


def check(config: FractionsConfig, field: str) -> None:
    """Raises UserError for fractions that are no fractions or leave nothing to train on."""
    for name in ("validation", "test"):
        if not 0 <= (value := getattr(config, name)) < 1:
            raise UserError(f"{field}.{name}={value}: expected a fraction from 0 up to below 1")
    if config.validation + config.test >= 1:
        raise UserError(
            f"{field}.validation={config.validation} and {field}.test={config.test} leave nothing to train on; their "
            "sum must be below 1"
        )


def near_copies(keys: np.ndarray, signatures: near_duplicates.Signatures) -> np.ndarray:
    """The key of each document's cluster of near copies: uint64 [documents], the smallest key among its members.

    keys    uint64 [documents], from the content hash; exact copies share theirs, and so their cluster

    Adding documents moves an old one only when a near copy of it comes in with a smaller key, or one that joins its
    cluster to another; all others keep their cluster's key, and so their split.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found = [np.zeros((0, 2), np.int64)]
    for band in range(minhash.BANDS):
        blocks = [first[i : i + near_duplicates.GATHER] for i in range(0, len(first), near_duplicates.GATHER)]
        groups = np.concatenate([minhash.band_keys(signatures[block], band) for block in blocks])
        found.append(near_duplicates.pairs(first, groups, signatures, SIMILAR))
    place = np.zeros(len(keys), np.int64)
    place[first] = np.arange(len(first))
    # `unique` sorted the keys, so the smallest place of a cluster is its smallest key.
    smallest = near_duplicates.clusters(place[np.concatenate(found)], len(first))
    return keys[first[smallest]][inverse]


def assign(keys: np.ndarray, config: FractionsConfig) -> np.ndarray:
    """uint8 [documents]: TRAIN, VALIDATION or TEST, a function of each key alone."""
    place = keys.astype(np.float64) / 2.0**64
    splits = np.full(len(keys), TRAIN, np.uint8)
    splits[place < config.validation + config.test] = TEST
    splits[place < config.validation] = VALIDATION
    return splits


def missing(splits: np.ndarray, config: FractionsConfig) -> list[int]:
    """The splits that should hold documents and hold none."""
    wanted = [TRAIN, *([VALIDATION] if config.validation else []), *([TEST] if config.test else [])]
    return [split for split in wanted if not (splits == split).any()]


def fill_missing(splits: np.ndarray, keys: np.ndarray, config: FractionsConfig) -> np.ndarray:
    """`splits` with every empty one given the first cluster, by key, of the training documents, while two are left."""
    if not (splits == TRAIN).any():
        splits = np.full_like(splits, TRAIN)
    splits = splits.copy()
    for split in missing(splits, config):
        clusters = np.unique(keys[splits == TRAIN])
        if len(clusters) > 1:
            splits[keys == clusters[0]] = split
    return splits
