"""Scores of predicted labels: macro F1 from counts, and correlations and errors of numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def macro_f1(confusion: np.ndarray) -> float:
    """The mean F1 score of the classes: the harmonic mean of precision and recall, 0 for a class without either.

    confusion  [classes, classes], how often a document of one class (row) was given another (column); where each class
               is decided by itself [classes, 2, 2], of whether it holds and whether that was predicted
    """
    if confusion.ndim == 3:
        right, actual, predicted = confusion[:, 1, 1], confusion[:, 1].sum(axis=-1), confusion[:, :, 1].sum(axis=-1)
    else:
        right, actual, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    total = actual + predicted
    return float(np.mean(np.divide(2 * right, total, out=np.zeros(len(total)), where=total > 0)))


def baseline_accuracy(confusion: np.ndarray) -> float:
    """The accuracy of always giving the most frequent class, or of each class by itself its more frequent answer."""
    if confusion.ndim == 3:
        answers = confusion.sum(axis=2)
        return float((answers.max(axis=1) / answers.sum(axis=1).clip(1)).mean())
    return float(confusion.sum(axis=1).max() / confusion.sum().clip(1))


def describe_baseline(scores: Mapping[str, Any]) -> tuple[str, float]:
    """(name, accuracy) of what an accuracy is compared with."""
    if "chance_accuracy" in scores:
        return "random choice", scores["chance_accuracy"]
    return "majority-class baseline", scores["baseline_accuracy"]


def pearson(predicted: np.ndarray, actual: np.ndarray) -> float:
    """The linear correlation of two vectors, computed in float64; 0 where one of them is constant."""
    x, y = (values.astype(np.float64) - values.astype(np.float64).mean() for values in (predicted, actual))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def spearman(predicted: np.ndarray, actual: np.ndarray) -> float:
    """The linear correlation of the ranks; equal numbers share the mean of their ranks."""
    import scipy.stats

    return pearson(scipy.stats.rankdata(predicted), scipy.stats.rankdata(actual))


def root_mean_square_error(predicted: np.ndarray, actual: np.ndarray) -> float:
    """The square root of the mean squared difference, in the unit of the numbers."""
    return float(np.sqrt(np.mean((predicted.astype(np.float64) - actual.astype(np.float64)) ** 2)))
