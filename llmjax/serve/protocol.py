"""Bodies of requests, as the OpenAI API names their fields. A field that is not listed is refused."""

import secrets
from typing import Annotated, Literal

import pydantic

from llmjax.inference.sampling import Sampling

_NOT_EMPTY = pydantic.Field(min_length=1)
_ABOVE_ZERO = pydantic.Field(ge=1)
_Zero = Annotated[float, pydantic.Field(ge=0, le=0)]
Text = pydantic.StrictStr
TokenIds = Annotated[list[pydantic.StrictInt], _NOT_EMPTY]


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """include_usage: whether the numbers of tokens follow the last part."""

    include_usage: bool = False


class Generation(_Body):
    """Fields of completions and of chat completions.

    seed       of the draws; None: another one each time
    top_k      0: all tokens; the OpenAI API has no such field
    penalties  only 0, which many clients send
    user       not used
    """

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: Annotated[int, _ABOVE_ZERO] = 1
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] | None = None
    stop: Text | Annotated[list[Text], pydantic.Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: _Zero = 0.0
    presence_penalty: _Zero = 0.0
    user: str | None = None

    @property
    def stop_strings(self) -> list[str]:
        """The strings before which a text ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, max_tokens: int) -> Sampling:
        """How texts are sampled. Raises UserError for a value out of range."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return Sampling(
            max_tokens=max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=seed
        )


class Completion(Generation):
    """The body of /v1/completions: one prompt or several, as texts or as token ids."""

    prompt: Text | TokenIds | Annotated[list[Text], _NOT_EMPTY] | Annotated[list[TokenIds], _NOT_EMPTY]
    max_tokens: Annotated[int, _ABOVE_ZERO] = 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_ids = isinstance(self.prompt[0], int)
        return [self.prompt] if is_ids else list(self.prompt)  # type: ignore[list-item, return-value]


class Part(_Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """A turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletion(Generation):
    """The body of /v1/chat/completions. Without a maximum, an answer may fill the context."""

    messages: Annotated[list[ChatMessage], _NOT_EMPTY]
    max_tokens: Annotated[int, _ABOVE_ZERO] | None = None
    max_completion_tokens: Annotated[int, _ABOVE_ZERO] | None = None
