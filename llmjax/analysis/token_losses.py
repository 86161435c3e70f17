"""The loss of each token of an example, for a heat map."""

import codecs
from collections.abc import Iterable, Sequence
import dataclasses

import numpy as np

from llmjax.analysis.task_examples import TaskExamples
from llmjax.evals.requests import LanguageModel, Pair
from llmjax.evals.tasks.examples import make_prompt

_MAX_TOKENS = 400  # of a text


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """A text as the model reads it.

    title    what the text is, such as "the right choice"
    before   the text before it, which is not scored
    tokens   its tokens as text; of several that are one character, the last one has it and the others are ""
    losses   their negative log-likelihoods in nats
    """

    title: str
    before: str
    tokens: list[str]
    losses: list[float]


def compute_token_losses(
    model: LanguageModel, scored: TaskExamples, indices: Sequence[int]
) -> dict[int, list[TokenLosses]]:
    """The texts of these examples with the losses of their tokens. Prompts are those without shots.

    Of pairs both texts, of choices and classes the right one and the predicted one, of generation the first right
    answer, of perplexity the text.
    """
    texts = [(index, *each) for index in indices for each in _list_texts(scored, index)]
    pairs: list[Pair] = []
    for _, _, before, text in texts:
        context, continuation = model.encode_pair(before, text)
        pairs.append((context, list(continuation)[: min(_MAX_TOKENS, model.max_length)]))
    results: dict[int, list[TokenLosses]] = {index: [] for index in indices}
    for (index, title, before, _), (_, ids), (losses, _) in zip(texts, pairs, model.score_tokens(pairs), strict=True):
        tokens = _decode_each(model.tokenizer.piece(int(token)) for token in ids)
        results[index].append(
            TokenLosses(title=title, before=before, tokens=tokens, losses=(-losses.astype(np.float64)).tolist())
        )
    return results


def _decode_each(pieces: Iterable[bytes]) -> list[str]:
    """The text of each piece; a character is that of the piece with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece) for piece in pieces]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)  # of a text that was cut
    return texts


def _list_texts(scored: TaskExamples, index: int) -> list[tuple[str, str, str]]:
    """(title, text before it, text) of each text of an example that is scored."""
    task, line, example = scored.task, scored.lines[index], scored.examples[index]
    if task.kind == "perplexity":
        return [("the text", "", scored.texts[index])]
    if task.kind == "pairs":
        good, bad = line["input"]
        return [("should be more likely", "", good), ("should be less likely", "", bad)]
    prompt = line.get("prompt") or make_prompt(task, example)  # the former by the chat template
    right = line["target"][0] if isinstance(line["target"], list) else line["target"]
    answers = [("the right answer", prompt, right)]
    if task.kind != "generate" and line["prediction"] != right:
        answers.append(("the prediction", prompt, line["prediction"]))
    return answers
