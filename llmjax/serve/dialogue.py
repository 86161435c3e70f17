"""A chat with a model: its turns so far, within the context of an engine."""

from collections.abc import Callable

from llmjax.data.chat_template import ChatTemplate, Message
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.inference.generate import Tokens
from llmjax.inference.sampling import Sampling
from llmjax.inference.streaming import TextStream
from llmjax.serve.engine import Engine, Request


class Dialogue:
    """The turns of a user and a model.

    `ask` adds a question and `answer` what the model says to it. Where they do not fit the context, the oldest pairs
    of a question and its answer are dropped; the system message stays.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        *,
        system: str | None = None,
    ):
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self._sampling = sampling
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self._prompt: Tokens = ()

    def check(self) -> None:
        """Raise UserError where not even a question of one letter can be answered, as `ask` does for each question."""
        self._engine.check(self._encode([{"role": "user", "content": "a"}]), self._sampling)

    def reset(self) -> None:
        """Forget all turns, but not the system message."""
        self._turns = []

    def ask(self, question: str) -> int:
        """Add a question, and return how many of the oldest messages no longer fit and were dropped.

        Raises UserError for a question that alone is too long, and where the template refuses it; it is not added.
        """
        turns: list[Message] = [*self._turns, {"role": "user", "content": question}]
        for dropped in range(0, len(turns), 2):
            prompt = self._encode(turns[dropped:])
            try:
                self._engine.check(prompt, self._sampling)
            except UserError:
                if dropped == len(turns) - 1:
                    raise
            else:
                self._turns, self._prompt = turns[dropped:], prompt
                return dropped
        raise AssertionError("turns end with a question, so that their number is odd")

    def answer(self, on_text: Callable[[str], None]) -> str:
        """Generate the answer to the last question, part by part, and add it. Returns why it ended: stop or length."""
        stream, parts, reasons = TextStream(self._tokenizer, self._prompt, self._sampling.stop), [], []

        def send(text: str) -> None:
            if text:
                parts.append(text)
                on_text(text)

        def take(token: int) -> None:
            send(stream.push(token))
            if stream.stopped:
                request.cancelled.set()

        request = Request(prompt=self._prompt, sampling=self._sampling, on_token=take, on_end=reasons.append)
        self._engine.submit([request])
        while self._engine.step():
            pass
        send(stream.finish())
        self._turns.append({"role": "assistant", "content": "".join(parts)})
        return reasons[0] if reasons else "stop"  # a stop string

    def _encode(self, turns: list[Message]) -> Tokens:
        return self._template.encode([*self._system, *turns], self._tokenizer)
