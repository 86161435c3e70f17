"""The application refuses what it cannot do in the form of the OpenAI API, and a client that goes frees its slots."""

import asyncio
import dataclasses
import json

import pytest

from llmjax.serve.app import Service, make_app
from tests.serve.asgi import call
from tests.serve.runs import make_service

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def service() -> Service:
    return make_service()


def post(service: Service, path: str, body, **named) -> tuple[int, bytes]:
    """(status, answer) while the engine runs."""
    return asyncio.run(call(make_app(service), path, body, meanwhile=service.engine.step, **named))


BAD = {
    "no json": (CHAT, b"{", "the body is not JSON"),
    "no object": (CHAT, [], "the body: "),
    "no messages": (CHAT, {}, "messages: Field required"),
    "empty messages": (CHAT, {"messages": []}, "messages: "),
    "role": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: "),
    "functions": (CHAT, {**HELLO, "tools": []}, "tools: Extra inputs are not permitted"),
    "penalty": (PLAIN, {"prompt": "a", "presence_penalty": 1.0}, "presence_penalty: Input should be less"),
    "unknown field": (PLAIN, {"prompt": "a", "best_of": 2}, "best_of: Extra inputs"),
    "text for a number": (PLAIN, {"prompt": "a", "max_tokens": "9"}, "max_tokens: "),
    "no tokens": (PLAIN, {"prompt": "a", "max_tokens": 0}, "max_tokens: "),
    "temperature": (PLAIN, {"prompt": "a", "temperature": -1.0}, "temperature=-1.0: must be 0"),
    "top_p": (PLAIN, {"prompt": "a", "top_p": 0.0}, "top_p=0.0"),
    "not a number": (PLAIN, b'{"prompt": "a", "temperature": NaN}', "temperature=nan"),
    "seed": (PLAIN, {"prompt": "a", "seed": 2**32}, "seed: "),
    "empty stop": (PLAIN, {"prompt": "a", "stop": [""]}, "stop='': every text contains it"),
    "no prompt": (PLAIN, {"prompt": []}, "prompt: expected a string, a list of strings, token ids, or a list of tok"),
    "null": (PLAIN, {"prompt": None}, "prompt: Field required"),
    "mixed": (PLAIN, {"prompt": ["a", [1]]}, "prompt: expected a string"),
    "image": (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content: expected a string or "),
    "stops": (PLAIN, {"prompt": "a", "stop": ["a"] * 17}, "stop: expected a string or at most 16 strings"),
    "min_p": (PLAIN, {"prompt": "a", "min_p": 2}, "min_p=2.0: must be from 0"),
    "repetition_penalty": (PLAIN, b'{"prompt": "a", "repetition_penalty": Infinity}', "repetition_penalty=inf: must"),
    "deep": (PLAIN, b"[" * 100_000, "There was an error parsing the body"),
    "ids": (PLAIN, {"prompt": [[1], [999]]}, "the prompt has token ids that are not from 0 to "),
    "too long": (PLAIN, {"prompt": "a" * 127}, "max_tokens=16: the prompt has 128 tokens, and the context 128"),
    "too long chat": (CHAT, {"messages": [{"role": "user", "content": "a" * 200}]}, "at most 0 new tokens fit"),
    "many texts": (PLAIN, {"prompt": ["a", "b"], "n": 3}, "n=3: these are 6 texts, and the server has places for 4"),
    "many chats": (CHAT, {**HELLO, "n": 5}, "n=5: these are 5 texts, and the server has places for 4"),
    "surrogate": (PLAIN, b'{"prompt": "\\ud800"}', ""),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_body_is_refused_with_its_field(service, case, stream):
    path, body, words = BAD[case]
    body = {**body, "stream": True} if stream and isinstance(body, dict) else body
    status, content = post(service, path, body)
    error = json.loads(content)["error"]
    assert status == 400 and words in error["message"] and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (PLAIN, {"prompt": "a", "model": "gpt"}, 404, "model='gpt': there is no such model; this server has 'tiny'"),
        ("/v1/other", {}, 404, "POST /v1/other: Not Found"),
        ("/v1/models", {}, 405, "POST /v1/models: Method Not Allowed"),
    ],
)
def test_what_is_not_there_is_said(service, path, body, status, message):
    answered, content = post(service, path, body)
    assert (answered, json.loads(content)["error"]["message"]) == (status, message)


def test_a_model_without_a_template_does_not_chat(service):
    plain = dataclasses.replace(service, template=None)
    status, content = post(plain, CHAT, HELLO)
    assert status == 400 and "has no chat template; use /v1/completions" in json.loads(content)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_client_that_goes_frees_its_slots(service, stream, parts):
    steps = []

    def step() -> None:
        steps.append(service.engine.step())

    body = {**HELLO, "max_tokens": 90, "temperature": 0.0, "stream": stream, "n": 2}
    asyncio.run(call(make_app(service), CHAT, body, disconnects_after=parts if stream else 0, meanwhile=step))
    assert not service.engine.step() and len(steps) < 40


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2**70},  # does not fit into an array of integers
        {"stop": None, "temperature": None, "n": None, "tools": None, "stream_options": None},
        {"prompt": "a\0b\r\n", "stop": ["\ud800"], "user": "\ud800"},
    ],
)
def test_an_unusual_body_is_answered(service, fields):
    status, content = post(service, PLAIN, {"prompt": "a", "max_tokens": 3, **fields})
    assert status == 200, content


def test_nothing_more_is_sent_to_a_client_that_has_gone(service):
    """Also where all tokens wait to be sent, so that no event of the stream waits for the engine."""

    def run_to_the_end() -> None:
        while service.engine.step():
            pass

    body = {**HELLO, "max_tokens": 90, "temperature": 0.0, "stream": True}
    _, sent = asyncio.run(call(make_app(service), CHAT, body, disconnects_after=3, meanwhile=run_to_the_end))
    assert 1 < sent.count(b"data: ") < 12


def test_a_full_queue_is_503(service):
    blocked = asyncio.run(_submit_two(service, {"prompt": "a", "n": 3}, {"prompt": "b", "n": 2}))
    assert blocked[0] == 503 and json.loads(blocked[1])["error"]["code"] == "queue_full"


async def _submit_two(service: Service, first: dict, second: dict) -> tuple[int, bytes]:
    """The answer to the second request while the first one waits."""
    app = make_app(service)
    running = asyncio.ensure_future(call(app, PLAIN, first, meanwhile=lambda: None))
    for _ in range(20):
        await asyncio.sleep(0)
    answered = await call(app, PLAIN, second)
    while not running.done():
        service.engine.step()
        await asyncio.sleep(0)
    assert (await running)[0] == 200
    return answered


def test_the_page_loads_nothing_from_elsewhere(service):
    status, page = asyncio.run(call(make_app(service), "/"))
    assert status == 200 and b"llmjax export" in page
    assert b"http://" not in page and b"https://" not in page and b"src=" not in page
