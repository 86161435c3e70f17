"""Decode new tokens as they come: whole characters only, up to a stop string."""

from collections.abc import Sequence
import re

import numpy as np

from llmjax.data.objectives.prompts import decode_continuation
from llmjax.data.store.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what tokenizers decode an incomplete character to, once or once a byte
_MOST_INCOMPLETE = 3  # bytes of a character
_CONTEXT = 16  # tokens before a new one, more than the bytes of a character
_BYTE_PIECE = re.compile(rb"<0x[0-9A-F]{2}>")


class TextStream:
    """The text of new tokens after a prompt, part by part.

    The parts together are `decode_continuation` of all new tokens, cut before the first stop string. A tokenizer may
    decode a token differently beside others, so each token is decoded after some before it.

    stopped   whether a stop string was found; further tokens add nothing
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray, stop: Sequence[str] = ()):
        """stop: as in Sampling."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._before: list[int] = list(prompt)
        self._new: list[int] = []
        self._sent = 0  # characters of the text of `_new`
        self.stopped = False
        if self._before and not self._is_byte(self._before[-1]):
            self._forget()

    def push(self, token_id: int) -> str:
        """The text that is certain with one more token, after what was returned before; often ''."""
        if self.stopped:
            return ""
        self._new.append(token_id)
        # Of a run of bytes, some tokenizers decode none if one is wrong, so that the run is decoded when it has ended.
        if self._is_byte(token_id):
            return ""
        text = decode_continuation(self._tokenizer, self._before, self._new)
        # Only the last bytes may still become a character.
        end = max(len(text.rstrip(_INCOMPLETE)), len(text) - _MOST_INCOMPLETE)
        part = self._send(text, end, hold_back=True)
        if self._sent == len(text) and len(self._new) >= _CONTEXT:
            self._forget()
        return part

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        text = decode_continuation(self._tokenizer, self._before, self._new)
        return self._send(text, len(text), hold_back=False)

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_PIECE.fullmatch(self._tokenizer.piece(token_id)) is not None

    def _forget(self) -> None:
        """Keep only the last tokens, so that the time for a token does not grow with the text.

        Without text among them, the next token could be decoded as the first of a text, without its space.
        """
        recent = [*self._before, *self._new][-_CONTEXT:]
        if self._tokenizer.decode(recent):
            self._before, self._new, self._sent = recent, [], 0

    def _send(self, text: str, end: int, *, hold_back: bool) -> str:
        """The part of `text` from what was sent up to `end`, a stop string, or what may become one."""
        found = [at for stop in self._stop if (at := text.find(stop, self._sent, end)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        elif hold_back:
            end -= max((_overlap(text[self._sent : end], stop) for stop in self._stop), default=0)
        begin, self._sent = self._sent, max(end, self._sent)
        return text[begin : self._sent]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins, without the whole of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
