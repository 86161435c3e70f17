"""Answers in the form of the OpenAI API: texts as a whole, as server-sent events, and errors."""

import asyncio
from collections.abc import AsyncIterator
import json
import time
from typing import Any
import uuid

from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmjax.serve.generation import Choice, Texts

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}


class Envelope:
    """The JSON objects of one completion, or of one chat completion."""

    def __init__(self, model: str, *, is_chat: bool, is_stream: bool):
        kind = "chat.completion" if is_chat else "text_completion"
        self.is_chat = is_chat
        self._base = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if is_chat and is_stream else kind,
            "created": int(time.time()),
            "model": model,
        }

    def wrap(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """An object with these choices."""
        return {**self._base, "choices": choices} | ({} if usage is None else {"usage": usage})

    def whole(self, choice: Choice, text: str) -> dict[str, Any]:
        """A choice with its whole text."""
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return self._frame(choice, content)

    def part(self, choice: Choice, text: str, *, is_first: bool = False) -> dict[str, Any]:
        """A choice with a part of its text."""
        role = {"role": "assistant"} if is_first else {}
        content = {"delta": {**role, "content": text}} if self.is_chat else {"text": text}
        return self._frame(choice, content)

    def _frame(self, choice: Choice, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice.index, **content, "logprobs": None, "finish_reason": choice.reason}


async def whole_response(request: Request, texts: Texts, envelope: Envelope) -> JSONResponse:
    """All texts at once. Nothing is generated any more once the client has gone."""
    parts: dict[int, list[str]] = {choice.index: [] for choice in texts.choices}

    async def collect() -> None:
        async for choice, text in texts.parts():
            parts[choice.index].append(text)

    collecting, leaving = (asyncio.ensure_future(task) for task in (collect(), _wait_for_disconnect(request)))
    try:
        done, _ = await asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        texts.cancel()
        collecting.cancel()
        leaving.cancel()
    for task in done:
        task.result()  # raises the error of the task, if it has one
    choices = [envelope.whole(choice, "".join(parts[choice.index])) for choice in texts.choices]
    return JSONResponse(envelope.wrap(choices, texts.usage))


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Parts of texts as server-sent events. Nothing is generated any more once the client has gone."""

    def __init__(self, texts: Texts, envelope: Envelope, *, include_usage: bool):
        self._texts = texts
        events = _events(texts, envelope, include_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._texts.cancel()


async def _events(texts: Texts, envelope: Envelope, include_usage: bool) -> AsyncIterator[str]:
    if envelope.is_chat:
        yield _event(envelope.wrap([envelope.part(choice, "", is_first=True) for choice in texts.choices]))
    async for choice, text in texts.parts():
        yield _event(envelope.wrap([envelope.part(choice, text)]))
    if include_usage:
        yield _event(envelope.wrap([], texts.usage))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def error_response(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error as the OpenAI API writes it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers=headers)
