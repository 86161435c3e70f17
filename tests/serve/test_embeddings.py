"""/v1/embeddings answers with the vectors of `llmjax embed`, beside texts that are being written, within its limits."""

import asyncio
import base64
import dataclasses
import functools
import json
import threading

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.inference.sampling import Sampling
from llmjax.serve.app import Service, make_app
from llmjax.serve.engine import QueueFullError
from tests.serve.asgi import call
from tests.serve.runs import BYTES, embed_texts, generate_texts, make_embedder, make_service

PATH = "/v1/embeddings"
TEXTS = ["one", "", "é and more than sixteen bytes of text", "<s>", "one"]


@functools.cache
def service() -> Service:
    return make_service()


def post(body, serving: Service | None = None, path: str = PATH, **named) -> tuple[int, dict]:
    """(status, answer) while the server computes."""
    serving = serving or service()

    def step() -> None:
        serving.embedder.step()
        if serving.engine is not None:
            serving.engine.step()

    status, content = asyncio.run(call(make_app(serving), path, body, meanwhile=step, **named))
    return status, json.loads(content) if content else {}


def vectors_of(body, serving: Service | None = None) -> np.ndarray:
    status, answer = post(body, serving)
    assert status == 200, answer
    assert answer["object"] == "list" and answer["model"] == "tiny"
    assert [(each["object"], each["index"]) for each in answer["data"]] == [
        ("embedding", index) for index in range(len(answer["data"]))
    ]
    return np.array([each["embedding"] for each in answer["data"]], np.float32)


def test_vectors_are_those_of_embed_whatever_the_other_texts_are():
    together = vectors_of({"input": TEXTS})
    np.testing.assert_allclose(together, embed_texts(TEXTS), rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 0.1
    for number in (0, 2):
        np.testing.assert_array_equal(vectors_of({"input": TEXTS[number]})[0], together[number])
    np.testing.assert_array_equal(together[0], together[4])


@pytest.mark.parametrize("settings", [{"pooling": "last", "normalize": True}, {"pooling": "max"}])
def test_pooling_and_normalization_are_those_of_embed(settings):
    serving = dataclasses.replace(service(), embedder=make_embedder(context=128, **settings))
    actual = vectors_of({"input": TEXTS}, serving)
    np.testing.assert_allclose(actual, embed_texts(TEXTS, **settings), rtol=1e-4, atol=1e-5)


def test_token_ids_are_read_as_they_are():
    text, ids = "one", [BYTES.bos_id, *b"one"]
    for given in (ids, [ids]):
        np.testing.assert_array_equal(vectors_of({"input": given}), vectors_of({"input": text}))
    assert (vectors_of({"input": ids[1:]}) != vectors_of({"input": text})).any()


def test_base64_holds_the_same_numbers():
    _, answer = post({"input": TEXTS, "encoding_format": "base64"})
    numbers = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in answer["data"]]
    np.testing.assert_array_equal(numbers, vectors_of({"input": TEXTS}))


def test_usage_counts_the_tokens_that_are_read():
    assert post({"input": ["one", "a"]})[1]["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert post({"input": [5, 6]})[1]["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


BAD = {
    "no input": ({}, "input: Field required"),
    "no texts": ({"input": []}, "input: expected a string, a list of strings, token ids, or a list of token ids; no"),
    "no tokens": ({"input": [[1], []]}, "input: expected"),
    "a number": ({"input": 5}, "input: expected"),
    "null": ({"input": [None]}, "input: expected"),
    "a fraction": ({"input": [1.5]}, "input: expected"),
    "mixed": ({"input": ["one", [5, 6]]}, "input: expected"),
    "ids": ({"input": [[1], [999]]}, "input 1 has token ids that are not from 0 to "),
    "negative ids": ({"input": [-1]}, "input 0 has token ids that are not from 0 to "),
    "huge ids": ({"input": [2**70]}, "input 0 has token ids that are not from 0 to "),
    "too long": ({"input": ["a", "a" * 128]}, "input 1 has 129 tokens, special tokens included, and at most 128"),
    "too many": ({"input": ["a"] * 2049}, "input: these are 2049 texts; give at most 2048 in a request"),
    "dimensions": ({"input": "a", "dimensions": 8}, "dimensions: Extra inputs are not permitted"),
    "format": ({"input": "a", "encoding_format": "int8"}, "encoding_format: "),
    "surrogate": (b'{"input": "\\ud800"}', ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_body_is_refused_with_its_field(case):
    body, words = BAD[case]
    status, answer = post(body)
    error = answer["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"] and "\n" not in error["message"]


def test_another_model_is_not_there():
    status, answer = post({"input": "a", "model": "gpt"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


@functools.cache
def encoder_service() -> Service:
    """An encoder that reads at most 40 tokens, though it could read more."""
    embedder = make_embedder("encoder", context=128, max_tokens=40)
    return dataclasses.replace(service(), engine=None, embedder=embedder, template=None)


def test_an_encoder_embeds_and_continues_no_text():
    actual = vectors_of({"input": TEXTS}, encoder_service())
    np.testing.assert_allclose(actual, embed_texts(TEXTS, "encoder"), rtol=1e-4, atol=1e-5)
    assert post({"input": "a" * 40}, encoder_service())[0] == 400
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", chat)):
        status, answer = post(body, encoder_service(), path)
        message = "the model 'tiny' embeds texts and does not continue them; use /v1/embeddings"
        assert (status, answer["error"]["message"]) == (400, message)


def test_texts_are_written_and_embedded_in_turns():
    """Each changes nothing of the other, and a step of the embedder is one batch."""
    serving, steps = service(), []

    def step() -> None:
        steps.append((serving.engine.step(), serving.embedder.step()))

    async def ask() -> list[tuple[int, bytes]]:
        app = make_app(serving)
        completion = {"prompt": "one", "max_tokens": 30, "temperature": 0.0}
        # Texts of 64 tokens: eight a batch, so 48 are six batches.
        embeddings = {"input": ["x" * 60] * 48}
        pairs = [("/v1/completions", completion), (PATH, embeddings)]
        return await asyncio.gather(*(call(app, path, body) for path, body in pairs), pump())

    async def pump():
        for _ in range(2000):
            step()
            await asyncio.sleep(0)
            if not any(steps[-1]) and len(steps) > 20:
                return

    completed, embedded, _ = asyncio.run(ask())
    (text,) = generate_texts([[BYTES.bos_id, *b"one"]], Sampling(max_tokens=30, temperature=0))
    assert json.loads(completed[1])["choices"][0]["text"] == text
    assert len(json.loads(embedded[1])["data"]) == 48
    assert sum(generating and embedding for generating, embedding in steps) >= 6


def test_a_small_request_does_not_wait_for_a_large_one():
    embedder, order = make_embedder(context=128, waiting=1), []
    for name, count in (("large", 100), ("small", 1)):
        rows = embedder.encode(["x" * 60] * count)
        embedder.submit(rows, lambda vectors, name=name: order.append(name), threading.Event())
    while embedder.step():
        pass
    assert order == ["small", "large"]


def test_a_full_queue_is_refused():
    embedder = make_embedder(context=128, waiting=1)
    rows, ignore = embedder.encode(["a"]), lambda vectors: None
    submit = lambda: embedder.submit(rows, ignore, threading.Event())
    submit(), submit()
    with pytest.raises(QueueFullError, match="2 requests for embeddings are waiting"):
        submit()
    while embedder.step():
        pass
    submit()


def test_a_client_that_goes_is_dropped():
    embedder, steps = service().embedder, []
    body = {"input": ["x" * 60] * 400}
    asyncio.run(
        call(make_app(service()), PATH, body, disconnects_after=0, meanwhile=lambda: steps.append(embedder.step()))
    )
    assert not embedder.step() and len(steps) < 20


def test_a_text_that_is_no_unicode_is_refused_by_embed_too():
    with pytest.raises(UserError, match="text 1: a half of a surrogate pair"):
        embed_texts(["a", "\ud800"])
