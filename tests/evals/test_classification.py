"""Scores of classes and probabilities equal scikit-learn's; calibration equals its definition and SciPy's optimum."""

import numpy as np
import pytest
import scipy.optimize
from sklearn import metrics as sklearn

from llmjax.errors import UserError
from llmjax.evals import classification


def draw(num_classes: int, count: int = 300, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(labels, logits), where the logits know something of the labels; with `ties` many of them are equal."""
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(0, num_classes, count)
    logits = rng.normal(size=(count, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return labels, np.round(logits) if ties else logits


@pytest.mark.parametrize("num_classes", [2, 4])
def test_scores_of_a_confusion_matrix_equal_scikit_learns(num_classes):
    labels, logits = draw(num_classes)
    predicted = logits.argmax(axis=1)
    predicted[predicted == num_classes - 1] = 0  # one class is never predicted
    confusion = classification.count_confusions(labels, predicted, num_classes)
    np.testing.assert_array_equal(confusion, sklearn.confusion_matrix(labels, predicted))
    scores = classification.score_confusions(confusion)
    expected = {"accuracy": sklearn.accuracy_score(labels, predicted)}
    expected["mcc"] = sklearn.matthews_corrcoef(labels, predicted)
    for average in ("macro", "micro"):
        values = sklearn.precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)
        expected |= {f"{name}_{average}": values[i] for i, name in enumerate(("precision", "recall", "f1"))}
    assert scores == pytest.approx(expected, abs=1e-12)
    classes = classification.score_classes(confusion)
    values = sklearn.precision_recall_fscore_support(labels, predicted, zero_division=0)
    for ours, theirs in zip((classes.precision, classes.recall, classes.f1), values, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_matthews_correlation_is_0_where_one_class_is_always_predicted():
    assert classification.matthews_correlation(np.array([[5, 0], [3, 0]])) == 0


@pytest.mark.parametrize("ties", [False, True])
def test_areas_under_curves_equal_scikit_learns(ties):
    labels, logits = draw(2, ties=ties)
    scores = classification.softmax(logits)
    roc, precision_recall = classification.aucs(labels, scores)
    assert roc == pytest.approx(sklearn.roc_auc_score(labels, scores[:, 1]), abs=1e-12)
    assert precision_recall == pytest.approx(sklearn.average_precision_score(labels, scores[:, 1]), abs=1e-12)
    labels, logits = draw(4, ties=ties)
    scores = classification.softmax(logits)
    roc, precision_recall = classification.aucs(labels, scores)
    assert roc == pytest.approx(sklearn.roc_auc_score(labels, scores, multi_class="ovr"), abs=1e-12)
    assert precision_recall == pytest.approx(
        sklearn.average_precision_score(np.eye(4)[labels], scores, average="macro"), abs=1e-12
    )


def test_a_set_without_negatives_has_no_area():
    assert np.isnan(classification.aucs(np.ones(3, int), np.full((3, 2), 0.5))).all()
    # of three classes one has no example: the mean is over the other two
    labels, scores = (
        np.array([0, 1, 0, 1]),
        np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]),
    )
    assert classification.aucs(labels, scores) == (1.0, 1.0)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_losses_of_probabilities_equal_scikit_learns(num_classes):
    labels, logits = draw(num_classes)
    scores = classification.softmax(logits)
    assert classification.log_losses(labels, scores).mean() == pytest.approx(
        sklearn.log_loss(labels, scores), abs=1e-12
    )
    binary = sklearn.brier_score_loss(labels, scores[:, 1]) if num_classes == 2 else None
    expected = binary if binary is not None else np.mean(((scores - np.eye(num_classes)[labels]) ** 2).sum(axis=1))
    assert classification.brier_scores(labels, scores).mean() == pytest.approx(expected, abs=1e-12)


def test_expected_calibration_error_by_its_definition():
    """Two bins by hand, then 15 bins against a loop over half-open intervals."""
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    bins = classification.bin_confidences(np.array([0, 1, 1, 0]), probabilities, num_bins=4)
    np.testing.assert_array_equal(bins.counts, [0, 0, 2, 2])
    assert bins.calibration_error == pytest.approx(0.5 * abs(0.5 - 0.65) + 0.5 * abs(0.5 - 0.85))
    labels, logits = draw(4)
    scores = classification.softmax(2 * logits)
    confidence, is_right = scores.max(axis=1), scores.argmax(axis=1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(is_right[inside].mean() - confidence[inside].mean())
    assert classification.bin_confidences(labels, scores).calibration_error == pytest.approx(expected, abs=1e-12)
    assert classification.bin_confidences(np.array([0, 0]), np.eye(2)[[0, 0]]).calibration_error == 0


def test_temperature_minimises_the_log_loss_and_undoes_a_scale():
    labels, logits = draw(3, 2000)
    loss = lambda t: classification.log_losses(labels, classification.softmax(logits, t)).mean()
    best = scipy.optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9})
    temperature = classification.fit_temperature(labels, logits)
    assert temperature == pytest.approx(best.x, rel=1e-5)
    for scale in (0.01, 30):
        assert classification.fit_temperature(labels, scale * logits) == pytest.approx(scale * temperature, rel=1e-9)
    # All are right: any low temperature. All are wrong: the hotter, the better.
    assert classification.fit_temperature(np.array([0, 1]), np.eye(2)) < 0.05
    assert classification.fit_temperature(np.array([1, 0]), np.eye(2)) == pytest.approx(1e4, rel=0.1)


def test_predictions_and_references_of_different_lengths_are_refused():
    with pytest.raises(UserError, match="2 predictions for 3 references: give one prediction for each"):
        classification.count_confusions(np.zeros(3, int), np.zeros(2, int), 2)
    with pytest.raises(UserError, match="0 predictions for 0 references"):
        classification.aucs(np.zeros(0, int), np.zeros((0, 2)))


@pytest.mark.parametrize("labels", [np.arange(40) % 2, np.repeat([0, 1, 2], 10), np.arange(40) % 2 == 0])
def test_both_halves_have_as_many_of_each_label(labels):
    """Halves by even and odd places would have one label each, where labels alternate."""
    halves = classification.split_halves(labels)
    for label in np.unique(labels):
        assert 2 * halves[labels == label].sum() == (labels == label).sum()
