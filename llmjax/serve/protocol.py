"""Bodies of requests, as the OpenAI API names their fields. A field that is not listed is refused."""

import secrets
from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import PydanticCustomError

from llmjax.errors import UserError
from llmjax.inference.sampling import Sampling

MAX_INPUTS = 2048  # of a request for embeddings, as in the OpenAI API
_NOT_EMPTY = pydantic.Field(min_length=1)
_ABOVE_ZERO = pydantic.Field(ge=1)
_Zero = Annotated[float, pydantic.Field(ge=0, le=0)]


def _expect(words: str) -> pydantic.WrapValidator:
    """A validator that says what was expected, where pydantic would say it for one member of a union."""

    def validate(value: Any, handler: pydantic.ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except pydantic.ValidationError:
            raise PydanticCustomError("expected", "expected {words}", {"words": words}) from None

    return pydantic.WrapValidator(validate)


Text = pydantic.StrictStr
TokenIds = Annotated[list[pydantic.StrictInt], _NOT_EMPTY]
# One text or several, each as a string or as token ids.
Texts = Annotated[
    Text | TokenIds | Annotated[list[Text], _NOT_EMPTY] | Annotated[list[TokenIds], _NOT_EMPTY],
    _expect("a string, a list of strings, token ids, or a list of token ids; no list may be empty"),
]


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _remove_nulls(cls, fields: Any) -> Any:
        """Without fields that are null, which in the OpenAI API means that they are not given."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(_Body):
    """include_usage: whether the numbers of tokens follow the last part."""

    include_usage: bool = False


class Generation(_Body):
    """Fields of completions and of chat completions.

    seed       of the draws; None: another one each time
    penalties  only 0, which many clients send
    user       not used

    The OpenAI API has no top_k, min_p and repetition_penalty, which are those of Sampling.
    """

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: Annotated[int, _ABOVE_ZERO] = 1
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] | None = None
    stop: (
        Annotated[
            Text | Annotated[list[Text], pydantic.Field(max_length=16)], _expect("a string or at most 16 strings")
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: _Zero = 0.0
    presence_penalty: _Zero = 0.0
    user: str | None = None

    def sampling(self, max_tokens: int) -> Sampling:
        """How texts are sampled. Raises UserError for a value out of range."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        )


class Completion(Generation):
    """The body of /v1/completions: one prompt or several, as texts or as token ids."""

    prompt: Texts
    max_tokens: Annotated[int, _ABOVE_ZERO] = 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        return _list_texts(self.prompt)


class EmbeddingRequest(_Body):
    """The body of /v1/embeddings: one text or several. `user` is not used."""

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each text. Raises UserError for too many."""
        texts = _list_texts(self.input)
        if len(texts) > MAX_INPUTS:
            raise UserError(f"input: these are {len(texts)} texts; give at most {MAX_INPUTS} in a request")
        return texts


def _list_texts(texts: Any) -> list[str | list[int]]:
    """Each of the `Texts`."""
    if isinstance(texts, str) or isinstance(texts[0], int):
        return [texts]
    return texts


class Part(_Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """A turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | list[Part],
        _expect('a string or parts {"type": "text", "text": "..."}; images, sound and files are not supported'),
    ]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletion(Generation):
    """The body of /v1/chat/completions. Without a maximum, an answer may fill the context."""

    messages: Annotated[list[ChatMessage], _NOT_EMPTY]
    max_tokens: Annotated[int, _ABOVE_ZERO] | None = None
    max_completion_tokens: Annotated[int, _ABOVE_ZERO] | None = None
