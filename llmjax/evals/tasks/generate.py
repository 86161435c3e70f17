"""Generation: the text that the model writes after a prompt, against the right answers."""

from collections.abc import Sequence

from etils import epath
import numpy as np

from llmjax.data.chat_template import ChatTemplate
from llmjax.errors import UserError
from llmjax.evals.config import SIMILARITIES, TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.examples import Example, make_prompts
from llmjax.evals.tasks.outcome import Groups, Outcome, Scores, score_means
from llmjax.evals.tasks.similarity import compare_answers
from llmjax.evals.text_scores import CorpusScores, exact_match, import_library, make_rouge, token_f1

_CORPUS = ("bleu", "chrf")


def run(
    task: TaskConfig,
    model: LanguageModel,
    examples: Sequence[Example],
    groups: Groups,
    *,
    template: ChatTemplate | None = None,
) -> Outcome:
    """Complete the examples greedily; the first `shots` of them are shown with their first right answer.

    BLEU and chrF are of all texts together; a line has those of its text alone.
    """
    rouges = [name for name in task.metrics if name not in (*_CORPUS, *SIMILARITIES)]
    score_rouge = make_rouge(rouges) if rouges else None  # before the model writes: the library may be missing
    if corpus_names := [name for name in task.metrics if name in _CORPUS]:
        import_library("sacrebleu", "sacrebleu", corpus_names[0])
    answers = [example.texts("answer_field", task.answer_field) for example in examples]
    for example, texts in zip(examples, answers, strict=True):
        if task.metrics and not any(text.strip() for text in texts):
            raise UserError(
                f"{example.where}.answer_field={task.answer_field!r}: {example.place} has no text there, and "
                f"{', '.join(task.metrics)} need a reference; fix the record, or remove it"
            )
    prompts, read = make_prompts(task, examples, [texts[0] for texts in answers[: task.shots]], template)
    answers = answers[task.shots :]
    # Spaces at the end belong to the answer: tokenizers join them with its first word.
    encoded = [model.encode_prompt(text.rstrip(" ")) for text in read]
    new = model.generate(encoded, stop=task.stop, max_tokens=task.max_tokens, template=template)
    texts = [text.strip() for text in new]
    matches = [exact_match(text, right) for text, right in zip(texts, answers, strict=True)]
    f1 = [token_f1(text, right) for text, right in zip(texts, answers, strict=True)]
    lines = [
        {
            "index": index,
            "input": prompts[index],
            **({} if template is None else {"prompt": read[index]}),
            "target": right,
            "prediction": texts[index],
            "exact_match": matches[index],
            "token_f1": f1[index],
        }
        for index, right in enumerate(answers)
    ]
    columns = {"exact_match": np.array(matches), "token_f1": np.array(f1)}
    if score_rouge is not None:
        scored = [score_rouge(text, right) for text, right in zip(texts, answers, strict=True)]
        columns |= {name: np.array([each[name] for each in scored]) for name in rouges}
    compared = [name for name in task.metrics if name in SIMILARITIES]
    if compared:
        similarities = compare_answers(epath.Path(task.embedder), texts, answers)
        columns |= {name: similarities[name] for name in compared}
    corpus = {name: CorpusScores(name, texts, answers) for name in corpus_names}
    of_texts = {name: columns[name] for name in (*rouges, *compared)} | {
        name: each.of_texts for name, each in corpus.items()
    }
    for name, values in of_texts.items():
        for line, value in zip(lines, values, strict=True):
            line[name] = float(value)
    main = task.metrics[0] if task.metrics else "exact_match"
    means = score_means(columns, main if main in columns else "exact_match", groups)

    def score(indices: np.ndarray) -> Scores:
        scores = {name: each.score(indices) for name, each in corpus.items()} | means(indices)
        if main in corpus:
            parts = groups.split(indices)
            scores |= {f"{main}/{name}": corpus[main].score(part) if len(part) else np.nan for name, part in parts}
        return {main: scores[main]} | scores

    details = {"signatures": {name: each.signature for name, each in corpus.items()}} if corpus else {}
    return Outcome(lines, score, main, details)
