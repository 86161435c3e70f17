"""Scores of predicted classes and of their probabilities, in numpy: one class for each example, or a set of classes.

labels         int [n], the right class of each example
predicted      int [n], the predicted class
probabilities  float [n, classes], each row sums to 1
Functions of sets of classes take `actual` and `predicted`, bool [n, classes], and a probability of each class alone.
A score that is undefined for its examples, such as the ROC AUC of a set without negatives, is nan.
"""

import dataclasses

import numpy as np

from llmjax.errors import UserError
from llmjax.evals.label_scores import macro_f1

NUM_BINS = 15  # of confidence, for the expected calibration error; as Guo et al. 2017 (arXiv:1706.04599)
_LOWEST, _HIGHEST = 1e-4, 1e4  # inverse temperatures
_TOLERANCE = 1e-10  # relative, of a temperature
_MAX_STEPS = 60  # bisection alone takes 38 from the range to the tolerance
_SEED = 0  # of the halves


def check_lengths(predictions: np.ndarray | list, references: np.ndarray | list) -> None:
    """Raise UserError where predictions and references are not one for one, or where there are none."""
    if len(predictions) != len(references) or not len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references: give one prediction for each of at "
            "least one reference"
        )


def count_confusions(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int [classes, classes]: how often an example of one class (row) was predicted to be of another (column)."""
    check_lengths(predicted, labels)
    pairs = labels * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """float [classes] each, 0 where the divisor is 0: precision of a class that is never predicted, for example."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def score_classes(confusion: np.ndarray) -> ClassScores:
    """Precision, recall and F1 of each class."""
    return _score_counts(np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0))


def score_class_sets(actual: np.ndarray, predicted: np.ndarray) -> ClassScores:
    """The same of sets of classes."""
    check_lengths(predicted, actual)
    return _score_counts((actual & predicted).sum(axis=0), actual.sum(axis=0), predicted.sum(axis=0))


def average_class_sets(actual: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Macro and micro precision, recall and F1 of sets of classes, and the share of examples whose whole set is right.

    A macro average is the mean over classes; a micro average counts every class of every example alike.
    """
    classes = score_class_sets(actual, predicted)
    totals = np.array([(actual & predicted).sum(), actual.sum(), predicted.sum()])[:, None]
    micro = _score_counts(*totals)
    macro = {f"{name}_macro": float(getattr(classes, name).mean()) for name in ("precision", "recall", "f1")}
    micro = {f"{name}_micro": float(getattr(micro, name)[0]) for name in ("precision", "recall", "f1")}
    return macro | micro | {"subset_accuracy": float((actual == predicted).all(axis=1).mean())}


def _score_counts(right: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> ClassScores:
    """Of the numbers of examples [classes] that have a class and were given it, have it, and were given it."""
    divide = lambda part, whole: np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
    return ClassScores(divide(right, predicted), divide(right, actual), divide(2 * right, actual + predicted))


def score_confusions(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, macro and micro precision, recall and F1, and Matthews' correlation.

    With one class for each example all micro averages equal the accuracy.
    """
    classes = score_classes(confusion)
    accuracy = float(np.trace(confusion) / confusion.sum())
    return {
        "accuracy": accuracy,
        "precision_macro": float(classes.precision.mean()),
        "recall_macro": float(classes.recall.mean()),
        "f1_macro": macro_f1(confusion),
        "precision_micro": accuracy,
        "recall_micro": accuracy,
        "f1_micro": accuracy,
        "mcc": matthews_correlation(confusion),
    }


def matthews_correlation(confusion: np.ndarray) -> float:
    """Matthews' correlation coefficient for any number of classes, R_K of Gorodkin 2004; 0 where it is undefined."""
    table = confusion.astype(np.float64)
    actual, predicted, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    scale = np.sqrt((total**2 - actual @ actual) * (total**2 - predicted @ predicted))
    return float((np.trace(table) * total - actual @ predicted) / scale) if scale > 0 else 0.0


def binary_aucs(is_positive: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """(area under the ROC curve, area under the precision-recall curve) of scores for one class.

    The first is the probability that a positive has a higher score than a negative, a tie counting as half. The second
    is the average precision: precision at each threshold, weighted by the recall that it adds, without interpolation.
    """
    order = np.argsort(-scores, kind="stable")
    positives = is_positive[order].astype(np.float64)
    is_last = np.append(np.diff(scores[order]) != 0, True)  # of the examples with an equal score: one threshold
    true = np.cumsum(positives)[is_last]
    false = np.cumsum(1 - positives)[is_last]
    if not true[-1] or not false[-1]:
        return np.nan, np.nan
    added = np.diff(true, prepend=0.0)
    # Positives of a threshold rank above the negatives after it, and tie with those that it adds.
    above = false[-1] - false + np.diff(false, prepend=0.0) / 2
    roc = float(added @ above / (true[-1] * false[-1]))
    return roc, float(added @ (true / (true + false)) / true[-1])


def aucs(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """`binary_aucs` of the second of two classes; of more, the mean over each class against all others.

    Classes that no example has, or all have, have no area and are left out of the mean.
    """
    check_lengths(probabilities, labels)
    num_classes = probabilities.shape[1]
    classes = [1] if num_classes == 2 else list(range(num_classes))
    return class_set_aucs(labels[:, None] == classes, probabilities[:, classes])


def class_set_aucs(actual: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """The mean of `binary_aucs` over the classes that some examples have and others lack; nan where there are none."""
    check_lengths(probabilities, actual)
    areas = np.array([binary_aucs(*columns) for columns in zip(actual.T, probabilities.T, strict=True)])
    areas = areas[~np.isnan(areas[:, 0])]
    return (float(areas[:, 0].mean()), float(areas[:, 1].mean())) if len(areas) else (np.nan, np.nan)


@dataclasses.dataclass(frozen=True)
class Bins:
    """Examples by their confidence, the probability of the predicted class, in intervals of equal width.

    counts      int [bins], examples; interval i holds the confidences above i / bins and up to (i + 1) / bins
    confidence  float [bins], mean confidence; 0 where there is no example
    accuracy    float [bins], share of right predictions; 0 where there is no example
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: |accuracy - confidence| of a bin, in the mean over examples."""
        return float(self.counts @ np.abs(self.accuracy - self.confidence) / self.counts.sum())


def bin_confidences(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> Bins:
    """The bins of a reliability plot."""
    check_lengths(probabilities, labels)
    confidences = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidences * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    mean = lambda values: np.bincount(bins, values, num_bins) / counts.clip(1)
    return Bins(counts, mean(confidences), mean(is_right.astype(np.float64)))


def brier_scores(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """float [n], squared errors of the probabilities, summed over the classes (Brier 1950); of two classes half of it,
    the squared error of one class."""
    check_lengths(probabilities, labels)
    errors = probabilities - np.eye(probabilities.shape[1])[labels]
    squares = (errors**2).sum(axis=1)
    return squares / 2 if probabilities.shape[1] == 2 else squares


def log_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """float [n], nats of the right class; a probability of 0 counts as the smallest difference of float64 from 1."""
    check_lengths(probabilities, labels)
    right = probabilities[np.arange(len(labels)), labels]
    return -np.log(right.clip(np.finfo(np.float64).eps))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities [n, classes] of logits [n, classes], in float64."""
    scaled = logits.astype(np.float64) / temperature
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def fit_temperature(labels: np.ndarray, logits: np.ndarray, start: float = 1.0) -> float:
    """The temperature whose softmax of the logits has the lowest mean log loss (Guo et al. 2017), in 1e-4 to 1e4.

    The loss is convex in the inverse temperature, so the zero of its derivative is found by Newton's steps within a
    shrinking interval. Where all predictions are right, any low enough temperature has a loss of 0, and one of those is
    returned; where they are no better than the uniform one, it is the highest.
    start   where the search begins; a close one saves time
    """
    check_lengths(logits, labels)
    logits = logits.astype(np.float64)
    low, high, inverse = _LOWEST, _HIGHEST, min(max(1 / start, _LOWEST), _HIGHEST)
    right = logits[np.arange(len(labels)), labels]
    for _ in range(_MAX_STEPS):
        probabilities = softmax(logits, 1 / inverse)
        means = (probabilities * logits).sum(axis=1)
        slope = float((means - right).mean())
        curvature = float(((probabilities * logits**2).sum(axis=1) - means**2).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        newton = inverse - slope / curvature if curvature > 0 else 0.0
        if abs(newton - inverse) <= _TOLERANCE * inverse or high - low <= _TOLERANCE * low:
            break
        inverse = float(newton if low < newton < high else np.sqrt(low * high))
    return 1 / inverse


def split_halves(labels: np.ndarray) -> np.ndarray:
    """int [n], 0 or 1: two random halves with as many examples of each label, but for an odd one.

    What one half decides, such as a threshold or a temperature, is tested on the other.
    """
    halves, rng = np.zeros(len(labels), np.int64), np.random.default_rng(_SEED)
    for label in np.unique(labels)[::-1]:
        members = np.flatnonzero(labels == label)
        halves[rng.permutation(members)] = np.arange(len(members)) % 2
    return halves
