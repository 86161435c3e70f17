"""Perplexity and bits per byte of texts: in total, by group, by length of the text, and by position in it."""

from collections.abc import Sequence
import math

import numpy as np

from llmjax.evals.config import TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.examples import Example
from llmjax.evals.tasks.outcome import Groups, Outcome, Scores

_LENGTHS = (0, 256, 1024, 4096, 16384)  # bytes from which each bucket of texts begins
_POSITIONS = (0, 16, 64, 256, 1024, 4096)  # tokens from which each bucket of positions begins
_MAX_NATS = 700.0  # of which exp is finite


def run(task: TaskConfig, model: LanguageModel, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Every token of every text is scored once; the end of a document is not, as in lm-eval.

    A text longer than data.seq_len is read in windows of that length, so a position is one in the text, not in a row.
    """
    texts = [example.text("text_field", task.text_name) for example in examples]
    scores = [-values.astype(np.float64) for values in model.rolling_tokens([model.encode(text) for text in texts])]
    nats = np.array([values.sum() for values in scores])
    tokens = np.array([len(values) for values in scores], np.float64)
    num_bytes = np.array([len(text.encode()) for text in texts], np.float64)
    lengths = Groups([_name_bucket(size, _LENGTHS, "bytes") for size in num_bytes])
    position_nats, position_counts = _sum_by_position(scores)
    used = [index for index in range(len(_POSITIONS)) if position_counts[:, index].any()]

    def score(indices: np.ndarray) -> Scores:
        total = nats[indices].sum()
        values = {
            "bits_per_byte": total / math.log(2) / num_bytes[indices].sum().clip(1),
            "perplexity": _perplexity(total, tokens[indices].sum()),
        }
        for prefix, parts in (("", groups), ("length ", lengths)):
            for name, mean in parts.means(nats / math.log(2), num_bytes, indices):
                values[f"bits_per_byte/{prefix}{name}"] = mean
            for name, mean in parts.means(nats, tokens, indices):
                values[f"perplexity/{prefix}{name}"] = _perplexity(mean, 1.0)
        sums, counts = position_nats[indices].sum(axis=0), position_counts[indices].sum(axis=0)
        for index in used:
            name = _name_bucket(_POSITIONS[index], _POSITIONS, "tokens")
            values[f"perplexity/position {name}"] = _perplexity(sums[index], counts[index])
        return {name: float(value) for name, value in values.items()}

    lines = [
        {
            "index": index,
            "input": text,
            "target": None,
            "prediction": None,
            "nats": float(nats[index]),
            "tokens": int(tokens[index]),
            "bytes": int(num_bytes[index]),
            "bits_per_byte": float(nats[index] / math.log(2) / max(num_bytes[index], 1)),
            "perplexity": _perplexity(nats[index], max(tokens[index], 1)),
        }
        for index, text in enumerate(texts)
    ]
    totals = {"tokens": int(tokens.sum()), "bytes": int(num_bytes.sum()), "nats": float(nats.sum())}
    return Outcome(lines, score, "bits_per_byte", totals)


def _perplexity(nats: float, tokens: float) -> float:
    return math.exp(min(nats / tokens, _MAX_NATS)) if tokens else math.nan


def _sum_by_position(scores: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(nats, tokens) float64 [texts, buckets] of each text in each bucket of positions."""
    nats, counts = np.zeros((2, len(scores), len(_POSITIONS)))
    for number, values in enumerate(scores):
        buckets = np.searchsorted(_POSITIONS, np.arange(len(values)), side="right") - 1
        nats[number] = np.bincount(buckets, values, len(_POSITIONS))
        counts[number] = np.bincount(buckets, minlength=len(_POSITIONS))
    return nats, counts


def _name_bucket(value: float, starts: Sequence[int], unit: str) -> str:
    """The name of the bucket that a value is in, such as "256-1023 bytes"."""
    number = int(np.searchsorted(starts, value, side="right")) - 1
    last = f"-{starts[number + 1] - 1}" if number + 1 < len(starts) else " and more"
    return f"{starts[number]}{last} {unit}"
