"""Prompts: token ids of what a user types, and the text of what a model adds."""

from collections.abc import Iterable

import numpy as np

from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a text that a user typed: here, other than in documents, special tokens stand for themselves.

    What an imported tokenizer makes of a text is not questioned: chat templates may hold marks that are plain text to
    it. Raises UserError as `check_special` does for others, and for bytes that the shell passed on and that are no
    UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the text {text!r} holds bytes that are no UTF-8; give it as UTF-8") from None
    if tokenizer.prompt_frame is None:
        tokenizer.check_special(text)
    return tokenizer.encode_prompt(text)


def frame_prompt(tokenizer: Tokenizer, ids: np.ndarray, begin: int) -> np.ndarray:
    """The ids of a prompt as an imported tokenizer frames them, or behind `begin`, which starts documents here.

    Of a prompt without any ids it is `begin` too, for a model has to read something.
    """
    before, after = tokenizer.prompt_frame or ((begin,), ())
    framed = np.concatenate([before, ids, after]).astype(np.int32)
    return framed if framed.size else np.array([begin], np.int32)


def decode_continuation(tokenizer: Tokenizer, prompt: Iterable[int], new: Iterable[int]) -> str:
    """The text that `new` ids add to that of `prompt`. Decoded alone, they would lose the space of the first word where
    the tokenizer marks the begin of a text by one."""
    prompt = list(prompt)
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    pairs = zip(before, whole, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(whole)))
    return whole[shared:]
