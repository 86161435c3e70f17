"""Classification: by the head of a run for classes, or by the likelihood of the classes' names after a prompt."""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np

from llmjax.data.chat_template import ChatTemplate
from llmjax.errors import UserError, suggest
from llmjax.evals import classification
from llmjax.evals.config import TaskConfig
from llmjax.evals.label_scores import baseline_accuracy, macro_f1
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.choice import score_choices
from llmjax.evals.tasks.examples import Example, make_prompts
from llmjax.evals.tasks.outcome import Groups, Outcome, Scores
from llmjax.inference.predict import Texts, predict
from llmjax.report.reliability import draw_reliability
from llmjax.run.loading import Loaded


@dataclasses.dataclass(frozen=True)
class _Predictions:
    """What is predicted of n examples.

    labels, predicted      int [n]
    logits, probabilities  float [n, classes]
    log_losses, brier      float [n]
    """

    labels: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    predicted: np.ndarray
    log_losses: np.ndarray
    brier: np.ndarray


def run_head(task: TaskConfig, loaded: Loaded, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Score the head of a run with objective.name="classify", which reads texts as in training."""
    classes = loaded.config.data.classes
    labels = _read_labels(task, examples, classes)
    texts = read_texts(task, examples)
    predicted, cut = predict(loaded, texts)
    probabilities = np.array([[label["probabilities"][each] for each in classes] for label in predicted])
    return _make_outcome(classes, list(map(join_pair, texts)), labels, np.log(probabilities.clip(1e-300)), groups, cut)


def run_likelihoods(
    task: TaskConfig,
    model: LanguageModel,
    examples: Sequence[Example],
    groups: Groups,
    *,
    template: ChatTemplate | None = None,
) -> Outcome:
    """Score the likelihoods of `choices`, which softmax makes probabilities; the first `shots` examples are shown."""
    labels = _read_labels(task, examples, task.choices)
    prompts, read = make_prompts(task, examples, [task.choices[label] for label in labels[: task.shots]], template)
    labels = labels[task.shots :]
    scores = score_choices(model, read, [task.choices] * len(prompts))
    outcome = _make_outcome(task.choices, prompts, labels, np.array([each["raw"] for each in scores]), groups)
    if template is not None:
        for line, text in zip(outcome.lines, read, strict=True):
            line["prompt"] = text
    return outcome


def read_texts(task: TaskConfig, examples: Sequence[Example]) -> list[Texts]:
    """The text of each example, and the second one of a pair."""
    seconds = [example.text("pair_field", task.pair_field) if task.pair_field else None for example in examples]
    return [
        (example.text("text_field", task.text_name), second) for example, second in zip(examples, seconds, strict=True)
    ]


def join_pair(texts: Texts) -> str:
    """What a line of the results shows of a text, or of a pair of texts."""
    first, second = texts
    return first if second is None else f"{first}\n{second}"


def _read_labels(task: TaskConfig, examples: Sequence[Example], classes: Sequence[str]) -> np.ndarray:
    """The number of the class of each example."""
    names = list(task.labels or classes)
    labels = []
    for example in examples:
        label = example.text("label_field", task.label_field)
        if label not in names:
            raise UserError(
                f"{example.where}.label_field={task.label_field!r}: {example.place} has the unknown label {label!r}"
                f"{suggest(label, names)}; expected one of {', '.join(names)}: fix the record, or name the labels of "
                f"the file in {example.where}.labels"
            )
        labels.append(names.index(label))
    return np.array(labels)


def _make_predictions(labels: np.ndarray, logits: np.ndarray) -> _Predictions:
    probabilities = classification.softmax(logits)
    return _Predictions(
        labels=labels,
        logits=logits,
        probabilities=probabilities,
        predicted=probabilities.argmax(axis=1),
        log_losses=classification.log_losses(labels, probabilities),
        brier=classification.brier_scores(labels, probabilities),
    )


def _make_outcome(
    classes: Sequence[str],
    inputs: Sequence[str],
    labels: np.ndarray,
    logits: np.ndarray,
    groups: Groups,
    num_cut: int = 0,
) -> Outcome:
    predictions = _make_predictions(labels, logits)
    lines = [
        {
            "index": index,
            "input": text,
            "target": classes[labels[index]],
            "prediction": classes[predictions.predicted[index]],
            "probabilities": dict(zip(classes, predictions.probabilities[index].tolist(), strict=True)),
            "accuracy": float(predictions.predicted[index] == labels[index]),
            "log_loss": float(predictions.log_losses[index]),
            "brier": float(predictions.brier[index]),
        }
        for index, text in enumerate(inputs)
    ]
    confusion = classification.count_confusions(labels, predictions.predicted, len(classes))
    bins = classification.bin_confidences(labels, predictions.probabilities)
    reliability = {"counts": bins.counts, "confidence": bins.confidence, "accuracy": bins.accuracy}
    details = {
        "classes": list(classes),
        "confusion": confusion.tolist(),
        "baseline_accuracy": baseline_accuracy(confusion),
        "reliability": {key: values.tolist() for key, values in reliability.items()},
    }
    title = f"expected calibration error {bins.calibration_error:.3f}"
    plot = draw_reliability(**details["reliability"], title=title)
    return Outcome(lines, _make_score(classes, predictions, groups), "accuracy", details, plot, num_cut)


def _make_score(classes: Sequence[str], predictions: _Predictions, groups: Groups) -> Callable[[np.ndarray], Scores]:
    """All scores of classes. Those that end with _scaled are of probabilities at another temperature, which for each
    half of the examples (`classification.split_halves`) is fitted on the other half."""
    temperature = classification.fit_temperature(predictions.labels, predictions.logits)
    scaled = _scale_crosswise(predictions.labels, predictions.logits)
    scaled_losses = classification.log_losses(predictions.labels, scaled)

    def score(indices: np.ndarray) -> Scores:
        some, chosen = predictions.labels[indices], predictions.probabilities[indices]
        confusion = classification.count_confusions(some, predictions.predicted[indices], len(classes))
        roc, precision_recall = classification.aucs(some, chosen)
        scores = classification.score_confusions(confusion) | {
            "roc_auc": roc,
            "pr_auc": precision_recall,
            "ece": classification.bin_confidences(some, chosen).calibration_error,
            "brier": float(predictions.brier[indices].mean()),
            "log_loss": float(predictions.log_losses[indices].mean()),
            "temperature": classification.fit_temperature(some, predictions.logits[indices], start=temperature),
            "ece_scaled": classification.bin_confidences(some, scaled[indices]).calibration_error,
            "log_loss_scaled": float(scaled_losses[indices].mean()),
        }
        by_class = classification.score_classes(confusion)
        for kind in ("precision", "recall", "f1"):
            for each, value in zip(classes, getattr(by_class, kind).tolist(), strict=True):
                scores[f"{kind}/{each}"] = value
        return scores | score_groups(groups, predictions.labels, predictions.predicted, len(classes), indices)

    return score


def score_groups(
    groups: Groups, labels: np.ndarray, predicted: np.ndarray, num_classes: int, indices: np.ndarray
) -> Scores:
    """Accuracy and macro F1 of each group, the lowest of each, and the gap to the highest; nothing without groups.

    A macro F1 is of the classes that the group's examples have or are predicted to have, as in scikit-learn. A group
    without any of these examples has no score, and takes no part in the gap.
    """
    scores: Scores = {}
    for name, measure in (("accuracy", _measure_accuracy), ("f1_macro", _measure_f1)):
        values = {
            group: measure(labels[part], predicted[part], num_classes) if len(part) else math.nan
            for group, part in groups.split(indices)
        }
        scores |= {f"{name}/{group}": value for group, value in values.items()}
        if values:
            present = np.array([value for value in values.values() if not math.isnan(value)])
            scores[f"{name}_worst_group"] = float(present.min())
            scores[f"{name}_gap"] = float(present.max() - present.min())
    return scores


def _measure_accuracy(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> float:
    return float((labels == predicted).mean())


def _measure_f1(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> float:
    confusion = classification.count_confusions(labels, predicted, num_classes)
    used = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    return macro_f1(confusion[np.ix_(used, used)])


def _scale_crosswise(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Probabilities at the temperature that the other half of the examples has; nan for a single example."""
    scaled, halves = np.full(logits.shape, math.nan), classification.split_halves(labels)
    for half in (0, 1):
        own, other = halves == half, halves != half
        if own.any() and other.any():
            temperature = classification.fit_temperature(labels[other], logits[other])
            scaled[own] = classification.softmax(logits[own], temperature)
    return scaled
