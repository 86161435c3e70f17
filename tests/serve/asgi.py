"""Requests to an ASGI application inside the process of a test."""

import asyncio
from collections.abc import Callable
import json
from typing import Any

from starlette.types import ASGIApp


async def call(
    app: ASGIApp,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    disconnects_after: int | None = None,
    meanwhile: Callable[[], Any] | None = None,
) -> tuple[int, bytes]:
    """(status, body) of the answer; GET without a body, which is bytes or becomes JSON.

    disconnects_after  the client goes after so many parts of the answer
    meanwhile          is called again and again until the answer has ended
    """
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"host": "localhost", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET" if body is None else "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields.items()],
    }
    half = len(content) // 2
    messages = [
        {"type": "http.request", "body": content[:half], "more_body": True},
        {"type": "http.request", "body": content[half:], "more_body": False},
    ]
    sent, gone = [], asyncio.Event()

    async def receive() -> dict:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)
        if disconnects_after is not None and len(sent) > disconnects_after:
            gone.set()

    async def pump() -> None:
        while meanwhile is not None:
            meanwhile()
            for _ in range(10):  # as in a server, most rounds of the event loop have no new token
                await asyncio.sleep(0)

    pumping = asyncio.ensure_future(pump())
    try:
        if disconnects_after == 0:
            gone.set()
        await asyncio.wait_for(app(scope, receive, send), 60)
    finally:
        pumping.cancel()
    status = next((message["status"] for message in sent if message["type"] == "http.response.start"), 0)
    return status, b"".join(message.get("body", b"") for message in sent)
