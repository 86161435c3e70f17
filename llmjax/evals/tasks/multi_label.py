"""Classification by a head that decides each class by itself (data.multi_label): an example has a set of classes."""

from collections.abc import Sequence

import numpy as np

from llmjax.errors import UserError, suggest
from llmjax.evals import classification
from llmjax.evals.config import TaskConfig
from llmjax.evals.tasks.classify import join_pair, read_texts
from llmjax.evals.tasks.examples import Example
from llmjax.evals.tasks.outcome import Groups, Outcome, Scores
from llmjax.inference.predict import predict
from llmjax.run.loading import Loaded

_MAIN = "f1_macro"


def run(task: TaskConfig, loaded: Loaded, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Score the head of a run with data.multi_label, which predicts the classes with a probability of 0.5 and more."""
    classes = loaded.config.data.classes
    actual = np.array([_read_classes(task, example, classes) for example in examples])
    texts = read_texts(task, examples)
    found, num_cut = predict(loaded, texts)
    probabilities = np.array([[each["probabilities"][name] for name in classes] for each in found])
    predicted = probabilities >= 0.5
    list_names = lambda row: [name for name, holds in zip(classes, row, strict=True) if holds]
    lines = [
        {
            "index": index,
            "input": join_pair(text),
            "target": list_names(actual[index]),
            "prediction": list_names(predicted[index]),
            "probabilities": found[index]["probabilities"],
            "subset_accuracy": float((actual[index] == predicted[index]).all()),
        }
        for index, text in enumerate(texts)
    ]

    def score(indices: np.ndarray) -> Scores:
        some, chosen = actual[indices], predicted[indices]
        by_class = classification.score_class_sets(some, chosen)
        roc, precision_recall = classification.class_set_aucs(some, probabilities[indices])
        means = classification.average_class_sets(some, chosen)
        scores = {_MAIN: means[_MAIN]} | means | {"roc_auc": roc, "pr_auc": precision_recall}
        for kind in ("precision", "recall", "f1"):
            values = getattr(by_class, kind).tolist()
            scores |= {f"{kind}/{name}": value for name, value in zip(classes, values, strict=True)}
        for name, part in groups.split(indices):
            in_group = classification.average_class_sets(actual[part], predicted[part]) if len(part) else {}
            scores[f"{_MAIN}/{name}"] = in_group.get(_MAIN, np.nan)
        return scores

    counts = {name: int(count) for name, count in zip(classes, actual.sum(axis=0), strict=True)}
    return Outcome(lines, score, _MAIN, {"multi_label": True, "classes": list(classes), "counts": counts}, "", num_cut)


def _read_classes(task: TaskConfig, example: Example, classes: Sequence[str]) -> list[bool]:
    """Whether each class holds for an example."""
    names = list(task.labels or classes)
    value = example.value("label_field", task.label_field)
    if not isinstance(value, list):
        raise UserError(
            f"{example.where}.label_field={task.label_field!r}: {example.place} has {value!r}, which is not a list of "
            "classes (data.multi_label=True); give a list, or an empty one"
        )
    given = list(map(str, value))
    if unknown := next((label for label in given if label not in names), None):
        raise UserError(
            f"{example.where}.label_field={task.label_field!r}: {example.place} has the unknown label {unknown!r}"
            f"{suggest(unknown, names)}; expected some of {', '.join(names)}: fix the record, or name the labels of "
            f"the file in {example.where}.labels"
        )
    return [name in given for name in names]
