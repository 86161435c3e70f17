"""Minimal pairs: which of two texts the model finds more likely. As BLiMP (arXiv:1912.00582) and CrowS-Pairs."""

from collections.abc import Sequence

import numpy as np

from llmjax.evals.config import TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.examples import Example
from llmjax.evals.tasks.outcome import Groups, Outcome, score_means


def run(task: TaskConfig, model: LanguageModel, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Score each pair: acc is the share whose good text is more likely; equal ones count half."""
    good = [example.text("good_field", task.good_field) for example in examples]
    bad = [example.text("bad_field", task.bad_field) for example in examples]
    nats = np.array(model.rolling([model.encode(text) for text in (*good, *bad)])).reshape(2, len(examples))
    difference = nats[0] - nats[1]
    right = (difference > 0) + (difference == 0) / 2
    lines = [
        {
            "index": index,
            "input": [good[index], bad[index]],
            "target": good[index],
            "prediction": good[index] if difference[index] >= 0 else bad[index],
            "nats": nats[:, index].tolist(),
            "acc": float(right[index]),
            "nats_difference": float(difference[index]),
        }
        for index in range(len(examples))
    ]
    columns = {"acc": right, "nats_difference": difference}
    return Outcome(lines, score_means(columns, "acc", groups), "acc", {"chance": 0.5})
