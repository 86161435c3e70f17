"""Decoding: any bytes become text, by their mark, UTF-8, the declaration or the likeliest encoding."""

from encodings.aliases import aliases
import random

import pytest

from llmjax.data.readers import encodings


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


def test_a_few_bad_bytes_do_not_change_the_encoding():
    data = "naïve café, où déjà".encode() + b" \xff " + "über".encode()
    assert encodings.decode(data) == ("naïve café, où déjà \ufffd über", {encodings.REPLACED: 1})


def test_replacement_characters_of_the_input_are_not_counted():
    assert encodings.decode("\ufffd é é".encode() + b"\xff") == ("\ufffd é é\ufffd", {encodings.REPLACED: 1})


def test_utf8_is_preferred_to_a_wrong_declaration():
    assert encodings.decode("été".encode(), "iso-8859-1") == ("été", {})


def test_declared_encoding_is_preferred_to_a_detected_one():
    assert encodings.decode(b"\xe9t\xe9 " * 20, "iso-8859-5").text == "щtщ " * 20


@pytest.mark.parametrize(
    "declared", ["utf-9", "base64", "idna", "undefined", "unicode_escape", "utf-7", "\0", "x" * 50]
)
def test_invalid_encoding_declaration_is_ignored(declared):
    assert encodings.decode(b"caf\xe9", declared).text == "café"


def test_utf16_without_a_mark():
    assert encodings.decode("plain words".encode("utf-16-le")).text == "plain words"
    assert encodings.decode("plain words".encode("utf-16-be")).text == "plain words"


def test_decode_never_raises():
    names = ["", *sorted(set(aliases.values()))]
    for seed in range(300):
        data = noise(seed, seed)
        encodings.decode(data)
        text_like = data.translate(bytes(range(32, 256)) + bytes(range(32, 64)))
        encodings.decode(text_like, names[seed % len(names)])
