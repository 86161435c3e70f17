"""Print what the model will see: the rows of a Batch as decoded tokens, inputs above targets."""

from collections.abc import Iterator
import unicodedata

import numpy as np

from llmjax.batch import Batch
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import Tokenizer

LEGEND = (
    "targets in parentheses are not scored; == marks the prefix, which is seen from everywhere; \u00b7 is a space; "
    "special ids are shown by name"
)


def lines(batch: Batch, objective: Objective, tokenizer: Tokenizer, width: int = 100) -> Iterator[str]:
    """The batch on the host as lines of about `width` characters, a row of it after the other."""
    show = _Pieces(objective, tokenizer)
    for row, sample in enumerate(batch.sample.astype(np.int64)):
        segments, chunks = batch.segments[row], int(batch.segments[row].max(initial=0))
        used, scored = int((segments > 0).sum()), int((batch.weights[row] > 0).sum())
        read = ""
        if batch.source is not None:
            filled = int((batch.source_segments[row] > 0).sum())
            read = f"{filled} of {batch.source.shape[1]} source places, "
        yield (
            f"sample {(sample[0] << 32) + sample[1]}: {chunks} {'chunks' if chunks != 1 else 'chunk'}, {read}"
            f"{used} of {len(segments)} places, {scored} scored"
        )
        for number in range(1, chunks + 1):
            yield f"  chunk {number}"
            if batch.source is not None:
                place = batch.source_segments[row] == number
                yield from _aligned({"source": [show(i) for i in batch.source[row][place]]}, width)
            place = segments == number
            targets = zip(batch.targets[row][place], batch.weights[row][place], strict=True)
            cells = {
                "inputs": [show(i) for i in batch.inputs[row][place]],
                "targets": [show(i) if weight else f"({show(i)})" for i, weight in targets],
            }
            if batch.prefix is not None:
                cells["prefix"] = ["==" if marked else "" for marked in batch.prefix[row][place]]
            yield from _aligned(cells, width)


class _Pieces:
    """id -> what it stands for, in visible characters."""

    def __init__(self, objective: Objective, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        names = {number: name for name, number in tokenizer.special_tokens.items()}
        self._names = names | (objective.vocabulary.names if objective.vocabulary else {})

    def __call__(self, number: int) -> str:
        number = int(number)
        if number in self._names:
            return self._names[number]
        if number >= self._tokenizer.vocab_size:
            return f"<{number}>"
        piece = self._tokenizer.piece(number)
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in piece)
        return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == " ":
        return "\u00b7"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _aligned(cells: dict[str, list[str]], width: int) -> Iterator[str]:
    """Labelled lines of equally many cells, each in a column as wide as its widest, broken at `width`."""
    columns = list(zip(*cells.values(), strict=True))
    label = max(map(len, cells)) + 6
    begin = 0
    while begin < len(columns):
        end, room = begin, width - label
        while end < len(columns) and (end == begin or room > max(map(_columns, columns[end]))):
            room -= 1 + max(map(_columns, columns[end]))
            end += 1
        widths = [max(map(_columns, column)) for column in columns[begin:end]]
        for name, values in cells.items():
            padded = (
                value + " " * (size - _columns(value)) for value, size in zip(values[begin:end], widths, strict=True)
            )
            yield f"    {name:{label - 4}}{' '.join(padded)}".rstrip()
        if end < len(columns) and len(cells) > 1:
            yield ""
        begin = end


def _columns(text: str) -> int:
    """The columns that a terminal gives to a text."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
