"""Assign documents to train, validation and test by a hash of their content; near-duplicates share a split."""

import numpy as np

from llmjax.data.config import FractionsConfig
from llmjax.data.store import minhash, near_duplicates
from llmjax.errors import UserError

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
NONE = 255  # of a document whose record names no split
SIMILARITY = 0.7  # fraction of equal signature values from which two texts are near-duplicates


def check_fractions(config: FractionsConfig, field: str) -> None:
    """Raise UserError for values outside [0, 1), or that leave nothing to train on."""
    for name in ("validation", "test"):
        if not 0 <= (value := getattr(config, name)) < 1:
            raise UserError(f"{field}.{name}={value}: expected a fraction from 0 up to below 1")
    if config.validation + config.test >= 1:
        raise UserError(
            f"{field}.validation={config.validation} and {field}.test={config.test} leave nothing to train on; their "
            "sum must be below 1"
        )


def cluster_near_copies(keys: np.ndarray, signatures: near_duplicates.Signatures) -> np.ndarray:
    """The key of each document's cluster of near-duplicates: uint64 [documents], the smallest key of its members.

    keys    uint64 [documents], from the content hash; exact copies have equal keys, and so the same cluster

    New documents change the cluster key of an old one only if a new near-duplicate of it has a smaller key, or joins
    its cluster with another one; all others keep their key, and so their split.
    """
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(minhash.BANDS):
        blocks = [first[i : i + near_duplicates.GATHER] for i in range(0, len(first), near_duplicates.GATHER)]
        groups = np.concatenate([minhash.hash_band(signatures[block], band) for block in blocks])
        pairs.append(near_duplicates.find_pairs(first, groups, signatures, SIMILARITY))
    index = np.zeros(len(keys), np.int64)  # into `unique`, of the documents in `first`
    index[first] = np.arange(len(first))
    # `unique` is sorted, so the smallest index of a cluster is that of its smallest key.
    smallest = near_duplicates.find_clusters(index[np.concatenate(pairs)], len(first))
    return unique[smallest][inverse]


def assign_splits(keys: np.ndarray, config: FractionsConfig) -> np.ndarray:
    """uint8 [documents]: TRAIN, VALIDATION or TEST, a function of each key alone."""
    fraction = keys.astype(np.float64) / 2.0**64
    splits = np.full(len(keys), TRAIN, np.uint8)
    splits[fraction < config.validation + config.test] = TEST
    splits[fraction < config.validation] = VALIDATION
    return splits


def find_missing(splits: np.ndarray, config: FractionsConfig) -> list[int]:
    """The splits that should have documents and have none."""
    required = [TRAIN, *([VALIDATION] if config.validation else []), *([TEST] if config.test else [])]
    return [split for split in required if not (splits == split).any()]


def fill_empty(splits: np.ndarray, keys: np.ndarray, config: FractionsConfig) -> np.ndarray:
    """Give every empty split the first cluster, by key, of the training documents, while there are two or more."""
    if not (splits == TRAIN).any():
        splits = np.full_like(splits, TRAIN)
    splits = splits.copy()
    for split in find_missing(splits, config):
        clusters = np.unique(keys[splits == TRAIN])
        if len(clusters) > 1:
            splits[keys == clusters[0]] = split
    return splits
