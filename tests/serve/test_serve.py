"""`llmjax serve` as a process: the client of the OpenAI API gets what `llmjax generate` writes; signals end it."""

import concurrent.futures
import re
import signal
import urllib.request

import numpy as np
import openai
import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.inference.sampling import Sampling
from tests.serve.runs import BYTES, CHAT, embed_texts, generate_texts, write_run
from tests.serve.server import start, stop

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def address(workdir):
    process, address = start(workdir, "--slots=2", "--context=128", LLMJAX_API_KEY="secret")
    yield address
    assert "stopped by signal 15" in stop(process, signal.SIGTERM)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)


def test_completions_are_those_of_generate(client):
    """Several clients at a time, greedy and by a seed; two texts after each of two prompts."""
    ask = lambda temperature: client.completions.create(
        model="run",
        prompt=["one", "two"],
        n=2,
        max_tokens=30,
        temperature=temperature,
        seed=7,
        top_p=0.9,
        extra_body={"min_p": 0.01, "repetition_penalty": 1.3},
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = list(pool.map(ask, [0.0, 0.8, 0.8, 0.0]))
    for result, temperature in zip(results, [0.0, 0.8, 0.8, 0.0], strict=True):
        sampling = Sampling(
            max_tokens=30, temperature=temperature, seed=7, top_p=0.9, min_p=0.01, repetition_penalty=1.3
        )
        expected = generate_texts([[BYTES.bos_id, *text.encode()] for text in ("one", "one", "two", "two")], sampling)
        assert [choice.text for choice in result.choices] == expected
        assert {choice.finish_reason for choice in result.choices} <= {"stop", "length"}
        usage = result.usage
        assert usage.prompt_tokens == 2 * 4 and 4 < usage.completion_tokens <= 4 * 30
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_chat_is_that_of_generate_whole_and_streamed(client):
    sampling = Sampling(max_tokens=40, temperature=0.7, seed=2)
    (expected,) = generate_texts([CHAT.encode(HELLO, BYTES)], sampling)
    ask = dict(model="run", messages=HELLO, max_tokens=40, temperature=0.7, seed=2)
    whole = client.chat.completions.create(**ask)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", expected)
    *parts, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content for part in parts) == expected
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]
    assert last.choices == [] and last.usage == whole.usage and len(parts) > 10


def test_embeddings_are_those_of_embed(client):
    texts = ["one", "two and three"]
    for form in ({}, {"encoding_format": "float"}):  # by default, the client asks for base64
        result = client.embeddings.create(model="run", input=texts, **form)
        actual = np.array([each.embedding for each in result.data], np.float32)
        np.testing.assert_allclose(actual, embed_texts(texts), rtol=1e-4, atol=1e-5)
        assert result.usage.prompt_tokens == result.usage.total_tokens == 4 + 14
    with pytest.raises(openai.BadRequestError, match="input 1 has 129 tokens"):
        client.embeddings.create(model="run", input=["a", "a" * 128])


def test_a_text_ends_before_a_stop_string(client):
    ask = dict(model="run", prompt="one", max_tokens=60, temperature=0.0)
    text = client.completions.create(**ask).choices[0].text
    stop_at = text[20:23]
    cut = client.completions.create(**ask, stop=stop_at).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop_at)], "stop")
    streamed = client.completions.create(**ask, stop=[stop_at], stream=True)
    assert "".join(part.choices[0].text for part in streamed) == cut.text


def test_errors_reach_the_client(client, address):
    assert [model.id for model in client.models.list()] == ["run"]
    with pytest.raises(openai.BadRequestError, match="the context 128"):
        client.completions.create(model="run", prompt="a" * 500)
    with pytest.raises(openai.NotFoundError, match="this server has 'run'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="other").models.list()
    with urllib.request.urlopen(f"{address}/") as page:
        assert b"Chat with" in page.read() and "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.mark.slow
def test_an_encoder_is_served_for_its_embeddings(tmp_path):
    process, address = start(write_run(tmp_path / "run", "encoder", template=None), "--context=40")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    actual = client.embeddings.create(model="run", input=["one", "two"]).data
    expected = embed_texts(["one", "two"], "encoder")
    np.testing.assert_allclose([each.embedding for each in actual], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match=r"input 0 has 41 tokens, .* at most 40 are"):
        client.embeddings.create(model="run", input="a" * 40)
    with pytest.raises(openai.BadRequestError, match="embeds texts and does not continue them"):
        client.completions.create(model="run", prompt="a")
    stop(process, signal.SIGTERM)


@pytest.mark.slow
def test_ctrl_c_ends_a_server_that_is_generating(workdir):
    process, address = start(workdir, "--context=8192")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="run", prompt="a", max_tokens=8000, stream=True)
    next(iter(stream))
    assert "stopped by signal 2" in stop(process, signal.SIGINT)


def test_a_port_in_use_is_one_line(workdir, address):
    port = address.rpartition(":")[2]
    with pytest.raises(UserError, match=f"--port={port}: in use on 127.0.0.1; end the program that uses it"):
        main.run(["serve", f"--workdir={workdir}", f"--port={port}"])


def test_missing_packages_are_named(workdir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"llmjax serve needs fastapi and uvicorn: run `pip install 'llmjax\[serve\]'`"):
        main.run(["serve", f"--workdir={workdir}"])


def test_a_context_that_memory_does_not_hold_is_refused(workdir):
    with pytest.raises(UserError, match="slots=1024, context=1000000000: out of memory for the cache"):
        main.run(["serve", f"--workdir={workdir}", "--port=0", "--slots=1024", "--context=1000000000"])


@pytest.mark.parametrize(
    ("flags", "key", "words"),
    [
        (["--host=0.0.0.0"], None, "--host=0.0.0.0: other machines can reach this address; set LLMJAX_API_KEY"),
        (["--host=::"], None, "--host=::: other machines can reach"),
        (["--host=192.0.2.1"], "key", "--host=192.0.2.1 --port=0: "),
        (["--host=no such host"], "key", "--host=no such host: "),
        ([], "", "LLMJAX_API_KEY='': the key is empty"),
    ],
)
def test_an_unsafe_or_wrong_address_is_refused(workdir, monkeypatch, flags, key, words):
    monkeypatch.delenv("LLMJAX_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("LLMJAX_API_KEY", key)
    with pytest.raises(UserError, match=re.escape(words)):
        main.run(["serve", f"--workdir={workdir}", "--port=0", *flags])
