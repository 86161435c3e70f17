"""Multiple choice: which of several texts has the highest likelihood after a prompt."""

from collections.abc import Sequence
import re
import string
from typing import Any

import numpy as np

from llmjax.data.chat_template import ChatTemplate
from llmjax.errors import UserError
from llmjax.evals.config import NORMALIZATIONS, TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.examples import Example, make_prompts
from llmjax.evals.tasks.outcome import Groups, Outcome, score_means


def score_choices(
    model: LanguageModel, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[dict[str, np.ndarray]]:
    """Of each prompt the log-likelihoods in nats of its choices, float64 [choices], by how they are normalised.

    raw   the sum over the tokens of a choice; bytes, tokens: divided by the number of its UTF-8 bytes or of its tokens
    """
    pairs = [
        model.encode_pair(prompt, choice) for prompt, texts in zip(prompts, choices, strict=True) for choice in texts
    ]
    nats = iter(model.loglikelihoods(pairs))
    sizes = iter(len(continuation) for _, continuation in pairs)
    scores = []
    for texts in choices:
        raw = np.array([next(nats)[0] for _ in texts])
        tokens = np.array([next(sizes) for _ in texts])
        num_bytes = np.array([len(text.encode()) for text in texts])
        scores.append({"raw": raw, "bytes": raw / num_bytes.clip(1), "tokens": raw / tokens.clip(1)})
    return scores


def run(
    task: TaskConfig,
    model: LanguageModel,
    examples: Sequence[Example],
    groups: Groups,
    *,
    template: ChatTemplate | None = None,
) -> Outcome:
    """Score the examples; the first `shots` of them are shown."""
    choices = [_read_choices(task, example) for example in examples]
    answers = [_find_answer(task, example, texts) for example, texts in zip(examples, choices, strict=True)]
    shown = [choices[number][answers[number]] for number in range(task.shots)]
    prompts, read = make_prompts(task, examples, shown, template)
    choices, answers = choices[task.shots :], answers[task.shots :]
    scores = score_choices(model, read, choices)
    # Of equal likelihoods the first choice is taken.
    right = {
        name: np.array([float(values[name].argmax() == answer) for values, answer in zip(scores, answers, strict=True)])
        for name in NORMALIZATIONS
    }
    lines = [
        {
            "index": index,
            "input": prompts[index],
            **({} if template is None else {"prompt": read[index]}),
            "target": choices[index][answers[index]],
            "prediction": choices[index][int(values[task.normalize].argmax())],
            "choices": list(choices[index]),
            "nats": values["raw"].tolist(),
            **{_name(name): right[name][index] for name in NORMALIZATIONS},
        }
        for index, values in enumerate(scores)
    ]
    main = _name(task.normalize)
    columns = {main: right[task.normalize]} | {_name(name): values for name, values in right.items()}
    chance = float(np.mean([1 / len(texts) for texts in choices]))
    return Outcome(lines, score_means(columns, main, groups), main, {"chance": chance})


def _name(normalization: str) -> str:
    return "acc" if normalization == "raw" else f"acc_{normalization}"


def _read_choices(task: TaskConfig, example: Example) -> list[str]:
    if task.choices:
        choices = [example.fill("choices", choice) for choice in task.choices]
    else:
        choices = example.texts("choices_field", task.choices_field)
    if len(choices) < 2 or not all(choices):
        raise UserError(f"{example.where}: {example.place} has the choices {choices}; expected two or more texts")
    return choices


def _find_answer(task: TaskConfig, example: Example, choices: Sequence[str]) -> int:
    """The number of the right choice: by its text, or its number from 0, or its letter."""
    if not task.answer_field:
        return 0
    value: Any = example.value("answer_field", task.answer_field)
    text = example.text("answer_field", task.answer_field)
    if not isinstance(value, int) and text in choices:
        return choices.index(text)
    number = int(text) if re.fullmatch(r"[0-9]+", text) else string.ascii_uppercase.find(text.strip() or "?")
    if isinstance(value, bool) or not 0 <= number < len(choices):
        raise UserError(
            f"{example.where}.answer_field={task.answer_field!r}: {example.place} has the answer {value!r}; give the "
            f"text of one of its {len(choices)} choices, its number from 0 or its letter from A"
        )
    return number
