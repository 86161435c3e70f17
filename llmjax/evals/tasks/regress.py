"""Regression: the numbers that a head gives, against those of the file."""

from collections.abc import Sequence

import numpy as np

from llmjax.evals.config import TaskConfig
from llmjax.evals.label_scores import pearson, root_mean_square_error, spearman
from llmjax.evals.tasks.classify import join_pair, read_texts
from llmjax.evals.tasks.examples import Example
from llmjax.evals.tasks.outcome import Groups, Outcome, Scores
from llmjax.inference.predict import predict
from llmjax.run.loading import Loaded


def run(task: TaskConfig, loaded: Loaded, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Score the head of a run with objective.name="regress". The score of a group is the RMSE."""
    texts = read_texts(task, examples)
    actual = np.array([example.number("label_field", task.label_field) for example in examples])
    labels, cut = predict(loaded, texts)
    predicted = np.array([label["label"] for label in labels])
    squared_errors = (predicted - actual) ** 2

    def score(indices: np.ndarray) -> Scores:
        some, expected = predicted[indices], actual[indices]
        scores = {
            "pearson": pearson(some, expected),
            "spearman": spearman(some, expected),
            "rmse": root_mean_square_error(some, expected),
        }
        for group, mean in groups.means(squared_errors, np.ones(len(actual)), indices):
            scores[f"rmse/{group}"] = float(np.sqrt(mean))
        return scores

    lines = [
        {
            "index": index,
            "input": join_pair(pair),
            "target": float(actual[index]),
            "prediction": float(predicted[index]),
            "squared_error": float(squared_errors[index]),
        }
        for index, pair in enumerate(texts)
    ]
    return Outcome(lines, score, "pearson", num_cut=cut)
