"""Texts of one HTTP request: submitted to the engine, and read part by part in the server's event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
import dataclasses
import threading

from llmjax.data.store.tokenizer import Tokenizer
from llmjax.inference.generate import Tokens
from llmjax.inference.sampling import Sampling
from llmjax.inference.streaming import TextStream
from llmjax.serve.engine import Engine, Request


@dataclasses.dataclass(eq=False)
class Choice:
    """One text.

    cancelled  see `Request`
    reason     why it ended: stop (a stop id or a stop string) or length; None: it has not
    """

    index: int
    stream: TextStream
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    num_tokens: int = 0
    reason: str | None = None


class Texts:
    """`n` texts after each prompt; text i is what `llmjax generate` writes after the i-th of these prompts.

    The engine calls back from its own thread; everything else belongs to the event loop. Always end with `cancel`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[Tokens],
        sampling: Sampling,
        *,
        n: int,
    ):
        """Raises UserError for what the engine cannot do, and QueueFullError."""
        for prompt in prompts:
            engine.check(prompt, sampling)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Choice, int | None, str | None]] = asyncio.Queue()
        self._num_prompt_tokens = sum(map(len, prompts))
        repeated = [prompt for prompt in prompts for _ in range(n)]
        self.choices = [Choice(i, TextStream(tokenizer, prompt, sampling.stop)) for i, prompt in enumerate(repeated)]
        pairs = zip(self.choices, repeated, strict=True)
        engine.submit([self._make_request(choice, prompt, sampling) for choice, prompt in pairs])

    def _make_request(self, choice: Choice, prompt: Tokens, sampling: Sampling) -> Request:
        return Request(
            prompt=prompt,
            sampling=sampling,
            row=choice.index,
            on_token=lambda token: self._post(choice, token, None),
            on_end=lambda reason: self._post(choice, None, reason),
            cancelled=choice.cancelled,
        )

    def _post(self, choice: Choice, token: int | None, reason: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody reads
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, token, reason))

    async def parts(self) -> AsyncIterator[tuple[Choice, str]]:
        """(choice, the next part of its text); with the last part of a choice, which may be '', it has a reason."""
        unfinished = len(self.choices)
        while unfinished:
            choice, token, reason = await self._events.get()
            if choice.reason is not None:  # tokens after a stop string
                continue
            if token is None:
                text, choice.reason = choice.stream.finish(), reason
            else:
                text = choice.stream.push(token)
                choice.num_tokens += 1
            if choice.stream.stopped:
                choice.reason = "stop"
                choice.cancelled.set()
            if choice.reason is not None:
                unfinished -= 1
            if text or choice.reason is not None:
                yield choice, text

    def cancel(self) -> None:
        """Free the slots of texts that have not ended."""
        for choice in self.choices:
            choice.cancelled.set()

    @property
    def usage(self) -> dict[str, int]:
        """The numbers of tokens so far. A prompt counts once, however many texts follow it."""
        new = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._num_prompt_tokens + new,
        }
