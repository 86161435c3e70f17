"""A linear quality classifier over hashed n-grams, trained with NumPy on good and bad examples."""

from collections.abc import Iterable, Iterator
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from llmjax.atomic import atomic_write
from llmjax.curate.filters.normalise import normalise
from llmjax.curate.filters.quality_config import ClassifierConfig
from llmjax.data.config import SourceConfig
from llmjax.data.hashing import GOLDEN_GAMMA, hash64
from llmjax.data.readers.documents import Document, read_unit
from llmjax.data.readers.sources import list_units
from llmjax.errors import UserError

_FORMAT = 1
_DEFAULTS = ClassifierConfig()


class Evaluation(NamedTuple):
    """Metrics on held-out texts of a model trained on the others. NaN if the held-out texts are all good or all bad.

    num_texts  number of held-out texts
    accuracy   fraction of correct decisions at 0.5, the mean over good and bad texts
    auc        probability that a good text scores above a bad one
    """

    num_texts: int
    accuracy: float
    auc: float


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A linear model.

    weights         float32 [num_buckets + 1]; the last is the bias
    max_characters  that are read, from the beginning of a text
    seed            of the hashes of its features
    """

    weights: np.ndarray
    max_characters: int
    seed: int

    def score(self, text: str) -> float:
        """The probability from 0 to 1 that a text is good, if good and bad ones are equally frequent."""
        features = _compute_features(text, len(self.weights) - 1, self.max_characters, self.seed)
        return float(_sigmoid(_logit(self.weights, features)))

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file, byte-identical for the same model."""
        path = Path(path).expanduser()
        if path.suffix != ".npz":
            raise UserError(f"{path}: the classifier's file must end in .npz")
        settings = np.array([_FORMAT, self.max_characters, self.seed], np.int64)
        with atomic_write(path) as file:
            np.savez(file, weights=self.weights, settings=settings)


def load(path: str | os.PathLike) -> Classifier:
    """Read a file that `save` wrote. Raises UserError if it does not exist or is another file."""
    path = Path(path).expanduser()
    where = f"curate.quality.classifier={str(path)!r}"
    try:
        with np.load(path, allow_pickle=False) as file:
            weights, settings = file["weights"], file["settings"].tolist()
    except FileNotFoundError:
        raise UserError(f"{where}: no such file; train a model with `llmjax curate classifier`") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{where}: not a classifier; train one with `llmjax curate classifier`") from None
    if len(settings) != 3 or settings[0] != _FORMAT or weights.ndim != 1 or weights.dtype != np.float32:
        raise UserError(f"{where}: written by another version; train it again")
    return Classifier(weights, *settings[1:])


def train_folders(
    good: str | os.PathLike, bad: str | os.PathLike, config: ClassifierConfig = _DEFAULTS
) -> tuple[Classifier, Evaluation]:
    """`train` on all texts in two folders: text files, JSONL, Parquet. Each text is normalised first, as in curation.

    Raises UserError for a folder without texts.
    """
    return train(_read_texts(good), _read_texts(bad), config)


def _read_texts(folder: str | os.PathLike) -> Iterator[str]:
    path = os.path.join(folder, "**", "*") if os.path.isdir(folder) else os.fspath(folder)
    for unit in list_units("classifier", SourceConfig(path=path)):
        for record in read_unit(unit):
            if isinstance(record, Document):
                yield normalise(record.text)[0]


def train(
    good: Iterable[str], bad: Iterable[str], config: ClassifierConfig = _DEFAULTS
) -> tuple[Classifier, Evaluation]:
    """(a classifier trained on all texts, the evaluation of one trained without the held-out texts).

    Logistic regression by AdaGrad; good and bad texts have equal total weight, whatever their numbers. The model is a
    function of the set of texts, to the last bit: they are sorted by hash, and copies count once.
    Raises UserError if there are no good or no bad texts, and for a text that is both.
    """
    classes = [_index_by_hash(texts) for texts in (bad, good)]
    for name, texts_by_hash in zip(("bad", "good"), classes, strict=True):
        if not texts_by_hash:
            raise UserError(f"the classifier has no {name} texts to train on")
    if in_both := classes[0].keys() & classes[1].keys():
        example = classes[0][min(in_both)][:60]
        raise UserError(f"{len(in_both)} texts are among both the good and the bad ones, such as {example!r}")
    digests = sorted([*classes[0], *classes[1]])
    labels = np.array([digest in classes[1] for digest in digests])
    texts = (classes[label].pop(digest) for digest, label in zip(digests, labels.tolist(), strict=True))
    examples = [_compute_features(text, config.num_buckets, config.max_characters, config.seed) for text in texts]
    order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(examples))
    hash_fractions = np.array([int.from_bytes(digest[:4], "big") / 2**32 for digest in digests])
    held_out = hash_fractions < config.held_out_fraction
    weights = _fit([examples[i] for i in order if not held_out[i]], labels[order[~held_out[order]]], config)
    logits = np.array([_logit(weights, examples[i]) for i in np.flatnonzero(held_out)])
    evaluation = _evaluate(logits, labels[held_out])
    if held_out.any():
        weights = _fit([examples[i] for i in order], labels[order], config)
    return Classifier(weights, config.max_characters, config.seed), evaluation


def _index_by_hash(texts: Iterable[str]) -> dict[bytes, str]:
    return {hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(): text for text in texts}


class _Features(NamedTuple):
    """Buckets of a text, int32 [features], and their values, float32 [features]; squares of values sum to at most 1."""

    buckets: np.ndarray
    values: np.ndarray


def _compute_features(text: str, num_buckets: int, max_characters: int, seed: int) -> _Features:
    data = text[:max_characters].lower().encode("utf-8", "replace")
    words = data.split()
    hashes = np.fromiter((zlib.crc32(word) for word in words), np.uint64, len(words))
    pairs = _salted_hash(hashes[:-1] * np.uint64(GOLDEN_GAMMA) + hashes[1:], seed + 1)
    byte = np.frombuffer(b" " + b" ".join(words) + b" ", np.uint8).astype(np.uint64)
    pieces = byte[:-3] | byte[1:-2] << np.uint64(8) | byte[2:-1] << np.uint64(16) | byte[3:] << np.uint64(24)
    groups = [_salted_hash(hashes, seed), pairs, _salted_hash(pieces, seed + 2)]
    buckets = [np.unique(group & np.uint64(num_buckets - 1)).astype(np.int32) for group in groups]
    buckets.append(np.array([num_buckets], np.int32))  # the bias
    values = [np.full(len(part), 1 / np.sqrt(len(buckets) * max(1, len(part))), np.float32) for part in buckets]
    return _Features(np.concatenate(buckets), np.concatenate(values))


def _salted_hash(values: np.ndarray, seed: int) -> np.ndarray:
    return hash64(np.array([seed + 1], np.uint64), values)


def _logit(weights: np.ndarray, features: _Features) -> float:
    return float((weights[features.buckets].astype(np.float64) * features.values).sum())


def _sigmoid(logit: float | np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logit, -500, 500)))


def _fit(examples: list[_Features], labels: np.ndarray, config: ClassifierConfig) -> np.ndarray:
    """float32 [buckets + 1] from labels bool [examples]: logistic regression in the order of the examples."""
    weights, squares = np.zeros(config.num_buckets + 1), np.full(config.num_buckets + 1, 1e-8)
    num_good = max(1, int(labels.sum()))
    num_bad = max(1, len(labels) - num_good)
    loss_weights = np.where(labels, len(labels) / (2 * num_good), len(labels) / (2 * num_bad))
    for _ in range(config.epochs):
        for begin in range(0, len(examples), config.batch_size):
            batch = examples[begin : begin + config.batch_size]
            sizes = np.array([len(example.buckets) for example in batch])
            buckets = np.concatenate([example.buckets for example in batch])
            values = np.concatenate([example.values for example in batch])
            logits = np.add.reduceat(weights[buckets] * values, np.cumsum(sizes) - sizes)
            span = slice(begin, begin + len(batch))
            errors = (_sigmoid(logits) - labels[span]) * loss_weights[span]
            touched, inverse = np.unique(buckets, return_inverse=True)
            gradient = np.bincount(inverse, weights=values * np.repeat(errors, sizes)) / len(batch)
            squares[touched] += gradient**2
            weights[touched] -= config.learning_rate * gradient / np.sqrt(squares[touched])
    return weights.astype(np.float32)


def _evaluate(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    good, bad = logits[labels], logits[~labels]
    if not good.size or not bad.size:
        return Evaluation(len(logits), float("nan"), float("nan"))
    accuracy = ((good > 0).mean() + (bad <= 0).mean()) / 2
    bad = np.sort(bad)
    num_below, num_up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return Evaluation(len(logits), float(accuracy), float((num_below + num_up_to).mean() / 2 / bad.size))
