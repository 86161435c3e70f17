"""Answers in the form of the OpenAI API: texts as a whole, as server-sent events, vectors, and errors."""

import asyncio
import base64
from collections.abc import AsyncIterator, Coroutine, Sequence
import contextlib
import json
import threading
import time
from typing import Any
import uuid

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmjax.inference.generate import Tokens
from llmjax.serve.embedder import Embedder
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

    try:
        await _run_while_connected(request, collect())
    finally:
        texts.cancel()
    choices = [envelope.whole(choice, "".join(parts[choice.index])) for choice in texts.choices]
    return JSONResponse(envelope.wrap(choices, texts.usage))


async def compute_vectors(request: Request, embedder: Embedder, rows: Sequence[Tokens]) -> np.ndarray | None:
    """float32 [rows, embed]; None if the client has gone, for whom nothing more is computed. Raises QueueFullError."""
    loop, vectors, cancelled = asyncio.get_running_loop(), asyncio.get_running_loop().create_future(), threading.Event()

    def set_vectors(computed: np.ndarray) -> None:
        if not vectors.done():  # else the client has gone
            vectors.set_result(computed)

    def post(computed: np.ndarray) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody reads
            loop.call_soon_threadsafe(set_vectors, computed)

    embedder.submit(rows, post, cancelled)
    try:
        await _run_while_connected(request, vectors)
    finally:
        cancelled.set()
    return None if vectors.cancelled() else vectors.result()


async def _run_while_connected(request: Request, work: Coroutine[Any, Any, None] | asyncio.Future[Any]) -> None:
    """Wait until the work has ended, or cancel it when the client has gone. Raises the work's error."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        done, _ = await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        leaving.cancel()
    for task in done:
        task.result()  # raises the error of the task, if it has one


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class VectorList(StreamingResponse):
    """Vectors of texts, written one by one: a response of many is long.

    vectors      float32 [texts, embed]; None: the client has gone
    num_tokens   of all texts
    is_base64    whether a vector is a base64 string of little-endian float32, else a list of numbers
    """

    def __init__(self, model: str, vectors: np.ndarray | None, num_tokens: int, *, is_base64: bool):
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        end = f'], "model": {json.dumps(model)}, "usage": {json.dumps(usage)}}}'

        async def write() -> AsyncIterator[str]:
            before = '{"object": "list", "data": ['
            for index, vector in enumerate(() if vectors is None else vectors):
                values = base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_base64 else vector.tolist()
                yield before + json.dumps({"object": "embedding", "index": index, "embedding": values})
                before = ", "
            yield end

        super().__init__(write(), media_type="application/json")


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
        await asyncio.sleep(0)  # where many tokens wait, lets the server see that the client has gone
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
