"""Factual consistency of a text, which the file has or the model writes: with a source, or with the model's samples.

Each method gives a signal for each text, a number that is larger for more consistent texts. Where the file has labels,
every signal is reported with its measured accuracy.
"""

from collections.abc import Callable, Sequence

import numpy as np

from llmjax.errors import UserError
from llmjax.evals import consistency
from llmjax.evals.classification import binary_aucs
from llmjax.evals.config import TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.choice import score_choices
from llmjax.evals.tasks.examples import Example, make_prompt
from llmjax.evals.tasks.outcome import Groups, Outcome, Scores

NOTE = (
    "a signal that is at chance says nothing: trust none without its accuracy on labelled texts of your own, for this "
    "model"
)
_LABELS = ("0", "false", "no"), ("1", "true", "yes")  # of inconsistent and of consistent texts, in any case
_ANSWERS = ("No", "Yes")
_QUESTION = "{{{source}}}\n\nStatement: {{{text}}}\nQuestion: Does the text above support the statement?\nAnswer: "

Ratio = tuple[np.ndarray, np.ndarray]  # numerators and denominators, float [examples]


def run(task: TaskConfig, model: LanguageModel, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Score the texts by each of `methods`; a rate is of all names, or n-grams, of the texts together."""
    labels = _read_labels(task, examples)
    prompts = [make_prompt(task, example) for example in examples] if task.prompt else []
    if task.write_text:
        encoded = [model.encode_prompt(prompt.rstrip(" ")) for prompt in prompts]
        texts = [text.strip() for text in model.generate(encoded, stop=task.stop, max_tokens=task.max_tokens)]
        examples = [
            example._replace(fields={**example.fields, task.text_name: text})
            for example, text in zip(examples, texts, strict=True)
        ]
    texts = [example.text("text_field", task.text_name) for example in examples]
    lines = [{"index": index, "input": text, "target": None, "prediction": None} for index, text in enumerate(texts)]
    rates: dict[str, Ratio] = {}
    means: dict[str, np.ndarray] = {}
    signals: dict[str, np.ndarray] = {}
    if "support" in task.methods:
        sources = [example.text("pair_field", task.pair_name) for example in examples]
        rates = _measure_support(texts, sources, lines)
        signals |= {name: -_divide(*rates[name]) for name in ("unsupported", "novel_ngrams")}
    if "entailment" in task.methods:
        signals["log_odds"] = means["log_odds"] = _find_log_odds(task, model, examples)
    if "samples" in task.methods:
        drawn = _draw_samples(task, model, prompts)
        for line, samples in zip(lines, drawn, strict=True):
            line["samples"] = samples
        surprises = [consistency.unigram_surprise(text, samples) for text, samples in zip(texts, drawn, strict=True)]
        means["sample_nats"] = np.array(surprises)
        signals["sample_nats"] = -means["sample_nats"]
    main = next(iter(signals))
    details = {"note": NOTE, "chance_levels": {}}
    detect: Callable[[np.ndarray], Scores] = lambda indices: {}
    if labels is not None:
        predicted = {name: consistency.predict_crosswise(labels, values) for name, values in signals.items()}
        detect = _make_detection(labels, signals, predicted)
        details["chance_levels"] = dict.fromkeys(detect(np.arange(len(labels))), 0.5)
        details["thresholds"] = {name: consistency.find_threshold(labels, values) for name, values in signals.items()}
        details["consistent"] = float(labels.mean())
        for index, line in enumerate(lines):
            line |= {"target": bool(labels[index]), "prediction": bool(predicted[main][index])}
    for index, line in enumerate(lines):
        line |= {name: float(values[index]) for name, values in means.items()}

    def score(indices: np.ndarray) -> Scores:
        scores = detect(indices)
        for name, (above, below) in rates.items():
            total = below[indices].sum()
            scores[name] = float(above[indices].sum() / total) if total else np.nan
        for name, values in means.items():
            scores[name] = float(values[indices].mean())
        if "log_odds" in means:
            scores["entailed"] = float((means["log_odds"][indices] > 0).mean())
        above, below = rates[main] if main in rates else (means[main], np.ones(len(texts)))
        return scores | {f"{main}/{name}": mean for name, mean in groups.means(above, below, indices)}

    return Outcome(lines, score, main if labels is None else f"{main}_roc_auc", details)


def _make_detection(
    labels: np.ndarray, signals: dict[str, np.ndarray], predicted: dict[str, np.ndarray]
) -> Callable[[np.ndarray], Scores]:
    """How well each signal tells consistent from inconsistent texts, as a function of indices of examples.

    The balanced accuracy of each half of the examples is at the threshold that is best for the other half.
    """

    def detect(indices: np.ndarray) -> Scores:
        scores, some = {}, labels[indices]
        for name, values in signals.items():
            scores[f"{name}_roc_auc"] = binary_aucs(some, values[indices])[0]
            scores[f"{name}_balanced_accuracy"] = consistency.balanced_accuracy(some, predicted[name][indices])
        return scores

    return detect


def _measure_support(texts: Sequence[str], sources: Sequence[str], lines: Sequence[dict]) -> dict[str, Ratio]:
    """The entities and the n-grams of the texts that their sources lack, beside all of them; adds them to the lines."""
    kinds = ("unsupported", *(f"unsupported_{kind}" for kind in consistency.KINDS), "novel_ngrams")
    counts = {name: np.zeros((2, len(texts))) for name in (*kinds, "texts_with_unsupported")}
    for index, (text, source, line) in enumerate(zip(texts, sources, lines, strict=True)):
        lacking = consistency.find_unsupported(text, source)
        for kind, (missing, total) in lacking.items():
            counts[f"unsupported_{kind}"][:, index] = len(missing), total
            counts["unsupported"][:, index] += len(missing), total
        counts["novel_ngrams"][:, index] = consistency.count_novel_ngrams(text, source)
        counts["texts_with_unsupported"][:, index] = counts["unsupported"][0, index] > 0, 1
        line["source"] = source
        line["unsupported"] = [word for missing, _ in lacking.values() for word in missing]
        line["novel_ngrams"] = _divide(*counts["novel_ngrams"][:, index, None]).item()
    return {name: (above, below) for name, (above, below) in counts.items()}


def _find_log_odds(task: TaskConfig, model: LanguageModel, examples: Sequence[Example]) -> np.ndarray:
    """The log-likelihood of yes minus that of no after the question, in nats: float64 [examples]."""
    question = task.verify_prompt or _QUESTION.format(source=task.pair_name, text=task.text_name)
    prompts = [example.fill("verify_prompt", question) for example in examples]
    scores = score_choices(model, prompts, [task.choices or _ANSWERS] * len(prompts))
    return np.array([each["raw"][1] - each["raw"][0] for each in scores])


def _draw_samples(task: TaskConfig, model: LanguageModel, prompts: Sequence[str]) -> list[list[str]]:
    """`samples` texts of each prompt."""
    encoded = [model.encode_prompt(prompt.rstrip(" ")) for prompt in prompts for _ in range(task.samples)]
    texts = model.generate(encoded, stop=task.stop, max_tokens=task.max_tokens, temperature=task.temperature)
    return [texts[start : start + task.samples] for start in range(0, len(texts), task.samples)]


def _read_labels(task: TaskConfig, examples: Sequence[Example]) -> np.ndarray | None:
    """bool [examples]: whether a person found each text consistent; None where the file has no labels."""
    field = task.label_field
    if not any(field in example.fields for example in examples) and field == TaskConfig.label_field:
        return None
    where = examples[0].where
    if task.write_text:
        raise UserError(f"{where}.write_text=True: the labels in {field!r} are of other texts; name another field")
    names = [(text,) for text in task.labels] or _LABELS
    known = {name: number for number, several in enumerate(names) for name in several}
    labels = []
    for example in examples:
        text = example.text("label_field", field)
        number = known.get(text if task.labels else text.casefold())
        if number is None:
            raise UserError(
                f"{where}.label_field={field!r}: {example.place} has the unknown label {text!r}; expected one of "
                f"{', '.join(known)}: fix the record, or name the labels of the file in {where}.labels"
            )
        labels.append(bool(number))
    return np.array(labels)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratios, 0 where the divisor is 0: a text without names has none that is unsupported."""
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)
