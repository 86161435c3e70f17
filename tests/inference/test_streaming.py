"""Streamed parts are whole characters, add up to the text that is decoded at once, and end before a stop string."""

import functools

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from llmjax.data.objectives.prompts import decode_continuation
from llmjax.data.store.tokenizer import read_tokenizer
from llmjax.data.store.tokenizer_training import train_sentencepiece
from llmjax.inference.streaming import TextStream
from tests.data.test_chat_template import read, tokenizer_json
from tests.interop.test_special_tokens import make_tokenizer, sentencepiece_model


def byte_fallback() -> tokenizers.Tokenizer:
    """Letters, and bytes for everything else, as in Llama 2: one wrong byte spoils the whole run of bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "\u2581c"]
    model = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(parts)
    model.add_special_tokens(["<unk>", "</s>"])
    return model


@functools.cache
def tokenizer(name: str):
    if name == "bytes":
        return read_tokenizer("bytes", b"")
    texts = ["hello world, hello there", "na\u00efve words of the world", "low, lower, lowest"] * 5
    if name == "sentencepiece":
        return read_tokenizer(name, train_sentencepiece(texts, algorithm="bpe", vocab_size=300))
    if name == "dummy prefix":
        settings = {"bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": -1, "byte_fallback": True, "vocab_size": 300}
        return read_tokenizer("sentencepiece", sentencepiece_model(model_type="bpe", **settings))
    made = {
        "byte level": lambda: tokenizer_json(),
        "space marks": lambda: make_tokenizer(),
        "byte fallback": byte_fallback,
    }[name]()
    return read(made) if name == "byte level" else read_tokenizer("huggingface", made.to_str().encode())


def stream(tokens, prompt, new, stop=()) -> list[str]:
    """What is returned for each token, and at the end."""
    texts = TextStream(tokens, prompt, stop)
    return [*(texts.push(int(token)) for token in new), texts.finish()]


@pytest.mark.parametrize("context", [4, 16])
@pytest.mark.parametrize(
    "name", ["bytes", "byte level", "space marks", "byte fallback", "sentencepiece", "dummy prefix"]
)
def test_parts_add_up_to_the_text_decoded_at_once(name, context, monkeypatch):
    monkeypatch.setattr("llmjax.inference.streaming._CONTEXT", context)
    tokens, rng = tokenizer(name), np.random.default_rng(0)
    text = "na\u00efve \u65e5\u672c \U0001f600 e\u0301 \ufffd hello there, world"
    readable = [np.concatenate([tokens.encode_prompt(text), [tokens.eos_id]])] * 3
    for new in [*readable, *(rng.integers(0, tokens.vocab_size, rng.integers(60)) for _ in range(200))]:
        cut = int(rng.integers(0, 9))
        parts = stream(tokens, new[:cut].tolist(), new[cut:])
        assert "".join(parts) == decode_continuation(tokens, new[:cut], new[cut:])


def test_a_character_comes_with_its_last_byte():
    new = "a\u00e9\U0001f600".encode()
    assert stream(tokenizer("bytes"), [256], new) == ["a", "", "\u00e9", "", "", "", "\U0001f600", ""]
    assert stream(tokenizer("bytes"), [256], "\u00e9".encode()[:1]) == ["", "\ufffd"]
    assert stream(tokenizer("bytes"), [256], b"\xff" * 5) == ["", "", "", "\ufffd", "\ufffd", "\ufffd" * 3]


def test_a_character_whose_first_byte_ends_the_prompt():
    before, after = "a\u00e9".encode()[:2], "\u00e9b".encode()[1:]
    assert stream(tokenizer("bytes"), list(before), after) == ["\u00e9", "b", ""]


def test_a_run_of_bytes_comes_when_it_has_ended():
    tokens = tokenizer("byte fallback")
    byte = lambda value: 2 + value
    letter, run = tokens.vocab_size - 3, [byte(0xC3), byte(0xA9)]
    assert stream(tokens, [], [letter, *run, letter]) == ["a", "", "", "\u00e9a", ""]
    assert stream(tokens, [], [letter, *run, byte(0xC3)]) == ["a", "", "", "", "\ufffd" * 3]


@pytest.mark.parametrize(
    ("text", "stop", "sent"),
    [
        ("abSTOPcd", ["STOP"], ["a", "b", *[""] * 6]),
        ("aSTSTOPb", ["STOP"], ["a", "", "", "ST", *[""] * 4]),
        ("abcd", ["xyz", "bc"], ["a", *[""] * 3]),
        ("abcd", ["cd", "bc"], ["a", *[""] * 3]),
        ("aaab", ["aab"], ["", "", "a", ""]),
    ],
)
def test_a_text_ends_before_a_stop_string(text, stop, sent):
    texts = TextStream(tokenizer("bytes"), [256], stop)
    assert [texts.push(token) for token in text.encode()] == sent
    assert texts.stopped and texts.finish() == ""


def test_the_begin_of_a_stop_string_is_held_back_until_the_text_ends():
    texts = TextStream(tokenizer("bytes"), [256], ["STOP"])
    assert [texts.push(token) for token in b"aST"] == ["a", "", ""]
    assert texts.finish() == "ST" and not texts.stopped
