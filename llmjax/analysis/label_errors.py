"""Likely label errors, by confident learning (Northcutt, Jiang and Chuang, 2021, arXiv:1911.00068)."""

from collections.abc import Sequence
import dataclasses

import numpy as np

FOLDS = 5
_SEED = 0
_TOLERANCE = 1e-6  # of a probability that reaches its threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelError:
    """An example whose label is likely wrong.

    index             of the example
    given, suggested  names of classes
    score             probability of the suggested class minus that of the given one, from -1 to 1
    """

    index: int
    given: str
    suggested: str
    score: float


def predict_out_of_fold(vectors: np.ndarray, labels: np.ndarray, *, seed: int = _SEED) -> np.ndarray | None:
    """Probabilities float64 [examples, classes] of each example by logistic regression on the examples of other folds.

    vectors  float [examples, dimensions], or a sparse matrix
    labels   int [examples], from 0; every class up to the highest has examples
    FOLDS folds, each with the same shares of classes. None where a class has fewer than FOLDS examples.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if np.bincount(labels).min() < FOLDS or len(np.unique(labels)) < 2:
        return None
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=1000)
    return np.asarray(cross_val_predict(model, vectors, labels, cv=folds, method="predict_proba"))


def count_confident(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The confident joint int64 [given, true], equations 1 and 2 of the paper.

    An example counts for the class of the highest probability among those that reach their threshold: the mean
    probability of a class over the examples that have its label. An example that reaches none is not counted.
    """
    size = probabilities.shape[1]
    thresholds = np.array([probabilities[labels == k, k].mean() if (labels == k).any() else 1.0 for k in range(size)])
    is_confident = probabilities >= thresholds - _TOLERANCE
    confident = np.where(is_confident, probabilities, -1.0).argmax(axis=1)
    counted = is_confident.any(axis=1)
    joint = np.zeros((size, size), np.int64)
    np.add.at(joint, (labels[counted], confident[counted]), 1)
    np.fill_diagonal(joint, joint.diagonal().clip(min=1))
    return joint


def estimate_errors(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The estimated number of examples float64 [given, true], equation 3: rows add up to the counts of the labels."""
    joint = count_confident(labels, probabilities).astype(np.float64)
    counts = np.bincount(labels, minlength=len(joint))
    return joint * (counts / joint.sum(axis=1))[:, None]


def find_label_errors(labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]) -> list[LabelError]:
    """The likely label errors, the likeliest first: "prune by noise rate" of section 3.2.

    labels         int [examples]: numbers of the given classes
    probabilities  float [examples, classes], of models that did not learn from the example
    names          of the classes
    For each pair of a given and another class, the estimated number of errors with the largest difference of both
    probabilities; without examples whose given class is the likeliest one.
    """
    expected = np.rint(estimate_errors(labels, probabilities)).astype(np.int64)
    is_error = np.zeros(len(labels), bool)
    for given in range(len(names)):
        members = np.flatnonzero(labels == given)
        for true in range(len(names)):
            number = min(int(expected[given, true]), len(members) - 1)
            if true != given and number > 0:
                margins = probabilities[members, true] - probabilities[members, given]
                is_error[members[np.argsort(-margins, kind="stable")[:number]]] = True
    suggested = probabilities.argmax(axis=1)
    rows = np.arange(len(labels))
    scores = probabilities[rows, suggested] - probabilities[rows, labels]
    found = np.flatnonzero(is_error & (suggested != labels))
    order = found[np.argsort(-scores[found], kind="stable")]
    return [
        LabelError(index=i, given=names[int(labels[i])], suggested=names[int(suggested[i])], score=float(scores[i]))
        for i in order.tolist()
    ]
