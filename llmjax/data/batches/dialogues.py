"""Dialogues in rows: each is one chunk, cut at the end of an assistant turn where it is longer than a row."""

from typing import NamedTuple

import numpy as np

from llmjax.data.store.token_store import TokenStore


class DialogueCounts(NamedTuple):
    """What did not fit rows.

    cut       dialogues that were cut at the end of the last whole assistant turn that fits
    left_out  dialogues none of whose assistant turns fits as a whole
    dropped   scored tokens of both that are in no row
    """

    cut: int = 0
    left_out: int = 0
    dropped: int = 0

    def __add__(self, other: "DialogueCounts") -> "DialogueCounts":  # pyright: ignore[reportIncompatibleMethodOverride]
        return DialogueCounts(*(a + b for a, b in zip(self, other, strict=True)))


def cut_dialogues(
    store: TokenStore, starts: np.ndarray, lengths: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray, DialogueCounts]:
    """One chunk for each dialogue, of at most `longest` targets: (start, length) of each, and what did not fit.

    The first token of a dialogue is an input only, so that the model reads what its template writes, with nothing
    before it. Of the marks, only those of long dialogues are read.
    """
    start, length = starts + 1, lengths - 1
    cut = left_out = dropped = 0
    for index in np.flatnonzero(length > longest).tolist():
        scored = store.gather_scored(starts[index : index + 1], lengths[index : index + 1])[1]
        assert scored is not None
        last = np.flatnonzero(scored & ~np.append(scored[1:], False))  # of each assistant turn
        last = last[last <= longest]
        length[index] = last[-1] if len(last) else 0
        cut, left_out = cut + bool(len(last)), left_out + (not len(last))
        dropped += int(scored[length[index] + 1 :].sum())
    is_kept = length > 0
    return start[is_kept], length[is_kept], DialogueCounts(cut, left_out, dropped)
