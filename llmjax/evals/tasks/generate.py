"""Generation: the text that the model writes after a prompt, against the right answers."""

from collections.abc import Sequence

import numpy as np

from llmjax.evals.config import TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.examples import Example, join_shots, make_prompt
from llmjax.evals.tasks.outcome import Groups, Outcome, score_means
from llmjax.evals.text_scores import exact_match, token_f1


def run(task: TaskConfig, model: LanguageModel, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Complete the examples greedily; the first `shots` of them are shown with their first right answer."""
    answers = [example.texts("answer_field", task.answer_field) for example in examples]
    prompts = [make_prompt(task, example) for example in examples]
    beginning = join_shots([(prompts[number], answers[number][0]) for number in range(task.shots)])
    prompts, answers = prompts[task.shots :], answers[task.shots :]
    # Spaces at the end belong to the answer: tokenizers join them with its first word.
    encoded = [model.encode_prompt((beginning + prompt).rstrip(" ")) for prompt in prompts]
    texts = [text.strip() for text in model.generate(encoded, stop=task.stop, max_tokens=task.max_tokens)]
    matches = [exact_match(text, right) for text, right in zip(texts, answers, strict=True)]
    f1 = [token_f1(text, right) for text, right in zip(texts, answers, strict=True)]
    lines = [
        {
            "index": index,
            "input": prompts[index],
            "target": right,
            "prediction": texts[index],
            "exact_match": matches[index],
            "token_f1": f1[index],
        }
        for index, right in enumerate(answers)
    ]
    columns = {"exact_match": np.array(matches), "token_f1": np.array(f1)}
    return Outcome(lines, score_means(columns, "exact_match", groups), "exact_match")
