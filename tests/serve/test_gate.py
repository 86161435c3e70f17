"""Requests without the key, by another name or with a long body do not reach the application."""

import asyncio
import json

import pytest
from starlette.responses import PlainTextResponse

from llmjax.serve.gate import MAX_BODY_BYTES, Gate
from tests.serve.asgi import call


async def echo(scope, receive, send) -> None:
    """Answer with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message["body"]), message["more_body"]
    await PlainTextResponse(str(length))(scope, receive, send)


def ask(gate: Gate, path: str = "/v1/models", body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """(status, message of the error or answer)"""
    status, content = asyncio.run(call(gate, path, body, headers=headers))
    return status, content.decode() if status == 200 else json.loads(content)["error"]["message"]


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer other"}, {"authorization": "k\u00e9y"}, {"authorization": "Basic key"}]
)
def test_a_request_without_the_key_is_refused(headers):
    gate = Gate(echo, key="key", hosts=None)
    status, message = ask(gate, **headers)
    assert status == 401 and "'Authorization: Bearer KEY'" in message
    assert ask(gate, "/") == (200, "0"), "the page has no secrets"


def test_the_key_lets_a_request_through():
    assert ask(Gate(echo, key="key", hosts=None), authorization="Bearer key") == (200, "0")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]:8000"])
def test_a_known_host_is_answered(host):
    assert ask(Gate(echo, key=None, hosts=frozenset({"localhost", "127.0.0.1", "::1"})), host=host) == (200, "0")


@pytest.mark.parametrize("host", ["example.org", "example.org:8000", "", "[", "localhost.example.org"])
def test_another_host_is_refused(host):
    status, message = ask(Gate(echo, key=None, hosts=frozenset({"localhost"})), host=host)
    assert status == 403 and message.endswith("this server answers only to localhost")


def test_the_body_has_a_limit():
    gate = Gate(echo, key=None, hosts=None)
    assert ask(gate, body=b"x" * MAX_BODY_BYTES) == (200, str(MAX_BODY_BYTES))
    status, message = ask(gate, body=b"x" * (MAX_BODY_BYTES + 1))
    assert status == 413 and f"more than {MAX_BODY_BYTES} bytes" in message
