"""Prompts: the token ids of a text that a user types, and the text that a model adds."""

from collections.abc import Iterable

import numpy as np

from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode a text that a user typed. Unlike in documents, special tokens are recognised.

    Raises UserError for text that looks like a special token and is none, except with an imported tokenizer, since
    chat templates may contain such text, and for bytes from the shell that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the text {text!r} contains bytes that are not UTF-8; give it as UTF-8") from None
    if tokenizer.prompt_frame is None:
        tokenizer.check_special(text)
    return tokenizer.encode_prompt(text)


def frame_prompt(tokenizer: Tokenizer, ids: np.ndarray, begin: int) -> np.ndarray:
    """Put the frame of an imported tokenizer around a prompt, or `begin`, the id that documents start with, before it.

    A prompt without any ids becomes `begin`, since a model has to read something.
    """
    before, after = tokenizer.prompt_frame or ((begin,), ())
    framed = np.concatenate([before, ids, after]).astype(np.int32)
    return framed if framed.size else np.array([begin], np.int32)


def decode_continuation(tokenizer: Tokenizer, prompt: Iterable[int], new: Iterable[int]) -> str:
    """The text that the ids `new` add to that of `prompt`.

    Decoded alone, they would lose the space before the first word if the tokenizer adds one to the start of a text.
    """
    prompt = list(prompt)
    prompt_text, full_text = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    pairs = zip(prompt_text, full_text, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt_text), len(full_text)))
    return full_text[shared:]
