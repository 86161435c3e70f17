"""What a request must fulfil before the application reads it: its host, its key, and the size of its body."""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmjax.serve.responses import error_response

MAX_BODY_BYTES = 1 << 20


class Gate:
    """ASGI middleware.

    key    what clients send as `Authorization: Bearer KEY` to everything below /v1; None: no key is needed
    hosts  names by which clients may call the server; None: any. Without this check, a web page whose name resolves
           to 127.0.0.1 could use a server without a key (DNS rebinding)
    """

    def __init__(self, app: ASGIApp, *, key: str | None, hosts: frozenset[str] | None):
        self._app, self._key, self._hosts = app, key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        headers = Headers(scope=scope)
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            message = f"host {headers.get('host', '')!r}: this server answers only to {', '.join(sorted(self._hosts))}"
            return await error_response(403, message)(scope, receive, send)
        if self._key is not None and scope["path"].startswith("/v1/") and not self._has_key(headers):
            message = "wrong or missing API key: send it as the header 'Authorization: Bearer KEY'"
            return await error_response(401, message, code="invalid_api_key")(scope, receive, send)
        body = await _read_body(receive)
        if body is None:
            message = f"the body has more than {MAX_BODY_BYTES} bytes; send a shorter one"
            return await error_response(413, message)(scope, receive, send)
        await self._app(scope, _replay(body, receive), send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # In constant time, and as bytes: a header may hold any of them.
        is_equal = hmac.compare_digest(key.strip().encode("latin-1"), (self._key or "").encode())
        return scheme.lower() == "bearer" and is_equal


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _read_body(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too long. A client that disconnects has sent what it has."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that begins with the body."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
