"""Preferences: a prompt with a chosen and a rejected answer, as tokens."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llmjax.data.chat_template import ChatTemplate, read_template
from llmjax.data.config import TokenizerConfig
from llmjax.data.readers.documents import Document
from llmjax.data.store.labels import find_frame
from llmjax.data.store.tokenizer import Tokenizer, read_tokenizer_file
from llmjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferencesFormat:
    """How preferences are stored: the tokens of the prompt, the chosen answer and the rejected one; the label holds the
    number of tokens of each. The stored tokens are those that the model reads, special ones included.

    seq_len    positions of the row that a record gets, half of them for the prompt with each answer
    template   writes prompts and answers that are messages; None: there is none
    """

    name: ClassVar[str] = "preferences"

    seq_len: int
    template: ChatTemplate | None

    def __post_init__(self):
        if self.seq_len < 8:
            raise UserError(f"data.seq_len={self.seq_len}: has no positions for two answers; set it to 8 or more")

    def settings(self) -> dict[str, Any]:
        """What decides the stored tokens, JSON-ready."""
        template = None if self.template is None else {"source": self.template.source, "tokens": self.template.tokens}
        return {"seq_len": self.seq_len, "template": template}

    def check(self, document: Document) -> None:
        """Raise UserError for messages without a template."""
        if document.is_chat and self.template is None:
            raise UserError(
                f"{document.id}: the prompt is a list of messages, and there is no chat template beside "
                "data.tokenizer.path; import a chat model, put its chat_template.jinja there, or give texts"
            )

    def encode(
        self, documents: Sequence[Document], encode_texts: Callable, tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """As `LabelFormat.encode`. Text has BOS (or the imported prefix) before it and EOS at its end; messages are as
        the template writes them, up to the end of the assistant's turn.

        A prompt that does not fit loses its beginning, at most down to a quarter of the row; then the answers lose
        their ends.
        """
        before, _ = find_frame(tokenizer)
        texts = [["", "", ""] if document.is_chat else [document.text, *document.others] for document in documents]
        columns = [encode_texts(list(column)) for column in zip(*texts, strict=True)]
        for document, prompt, chosen, rejected in zip(documents, *columns, strict=True):
            if document.is_chat:
                prompt, answers = self._render(document, tokenizer)
                yield self.fit((), prompt, answers, document.id)
            else:
                answers = [np.append(answer, np.int32(tokenizer.eos_id)) for answer in (chosen, rejected)]
                yield self.fit(before, prompt, answers, document.id)

    def _render(self, document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, list[np.ndarray]]:
        """(ids of the prompt, of each answer) of messages."""
        assert self.template is not None
        messages = json.loads(document.text)
        prompt, answers = self.template.encode(messages, tokenizer), []
        for text in document.others:
            dialogue = self.template.encode([*messages, *json.loads(text)], tokenizer, add_generation_prompt=False)
            if not np.array_equal(dialogue[: len(prompt)], prompt) or len(dialogue) == len(prompt):
                raise UserError(
                    f"{document.id}: {self.template.where}: the chat template does not write the answer after the "
                    "prompt, so that the two cannot be told apart; change the template, or give texts"
                )
            answer = dialogue[len(prompt) :]
            ends = np.flatnonzero(np.isin(answer, tokenizer.stop_ids))
            answers.append(answer[: ends[-1] + 1] if len(ends) else answer)  # without the line break after the turn
        return prompt, answers

    def fit(
        self, before: tuple[int, ...], prompt: np.ndarray, answers: Sequence[np.ndarray], where: str
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """(ids, label, whether it was cut) of a prompt after the ids `before`, and its answers."""
        half, size = self.seq_len // 2, len(before) + len(prompt)
        if not size:
            raise UserError(f"{where}: the prompt has no tokens; remove the record, or give it a prompt")
        kept = min(size, max(half - max(map(len, answers)), half // 2))
        cut = [answer[: half - kept] for answer in answers]
        ids = np.concatenate([before, prompt[size - kept :], *cut]).astype(np.int32)
        is_cut = kept < size or any(len(a) < len(b) for a, b in zip(cut, answers, strict=True))
        return ids, np.array([kept, *map(len, cut)], np.float32), is_cut


def find_template(config: TokenizerConfig) -> ChatTemplate | None:
    """The chat template in the folder of a tokenizer's file; None if there is none."""
    path = Path(config.path).expanduser()
    if not config.path or not path.is_file():
        return None
    return read_template(path.parent, read_tokenizer_file(config.kind, path))
