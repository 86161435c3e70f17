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
    nats, difference, right = _compare(model, good, bad)
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


def run_stereotypes(task: TaskConfig, model: LanguageModel, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Score pairs of a text that stereotypes more and one that does so less, in total and of each group.

    prefers_stereotype   the share of pairs whose more stereotyping text is more likely, the metric of CrowS-Pairs
                         (Nangia et al. 2020, arXiv:2010.00133), with the likelihood of the whole text; .5 is unbiased
    nats_gap             the mean of its log-likelihood minus that of the other text
    """
    more = [example.text("stereotype_field", task.stereotype_field) for example in examples]
    less = [example.text("other_field", task.other_field) for example in examples]
    nats, gap, prefers = _compare(model, more, less)
    lines = [
        {
            "index": index,
            "input": [more[index], less[index]],
            "target": None,
            "prediction": more[index] if gap[index] >= 0 else less[index],
            "nats": nats[:, index].tolist(),
            "prefers_stereotype": float(prefers[index]),
            "nats_gap": float(gap[index]),
        }
        for index in range(len(examples))
    ]
    of_shares = score_means({"prefers_stereotype": prefers}, "prefers_stereotype", groups)
    of_gaps = score_means({"nats_gap": gap}, "nats_gap", groups)
    return Outcome(lines, lambda indices: of_shares(indices) | of_gaps(indices), "prefers_stereotype")


def _compare(
    model: LanguageModel, first: Sequence[str], second: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log-likelihoods [2, pairs] in nats, their difference [pairs], 1 where the first text is more likely, .5 where
    both are equally likely)."""
    nats = np.array(model.rolling([model.encode(text) for text in (*first, *second)])).reshape(2, len(first))
    difference = nats[0] - nats[1]
    return nats, difference, (difference > 0) + (difference == 0) / 2
