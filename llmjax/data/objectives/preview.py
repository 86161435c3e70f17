"""Show what the model will see: the rows of a Batch as decoded tokens, inputs above targets."""

from collections.abc import Iterator
import unicodedata

import numpy as np

from llmjax.batch import Batch
from llmjax.data.config import EMBEDDING
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import Tokenizer

LEGEND = (
    "targets in parentheses are not scored; == marks the prefix, which every position sees; \u00b7 is a space; "
    "special ids are shown by name"
)


def format_batch(batch: Batch, objective: Objective, tokenizer: Tokenizer, width: int = 100) -> Iterator[str]:
    """Yield the rows of a batch as lines of about `width` characters."""
    show = _Formatter(objective, tokenizer)
    for row, sample in enumerate(batch.sample.astype(np.int64)):
        segments, chunks = batch.segments[row], int(batch.segments[row].max(initial=0))
        used, scored = int((segments > 0).sum()), int((batch.weights[row] > 0).sum())
        source = ""
        if batch.source is not None:
            filled = int((batch.source_segments[row] > 0).sum())
            source = f"{filled} of {batch.source.shape[1]} source positions, "
        yield (
            f"sample {(sample[0] << 32) + sample[1]}: {chunks} {'chunks' if chunks != 1 else 'chunk'}, {source}"
            f"{used} of {len(segments)} positions, {scored} scored"
        )
        for number in range(1, chunks + 1):
            yield f"  chunk {number}"
            if batch.source is not None:
                inside = batch.source_segments[row] == number
                yield from _align({"source": [show(i) for i in batch.source[row][inside]]}, width)
            inside = segments == number
            targets = zip(batch.targets[row][inside], batch.weights[row][inside], strict=True)
            cells = {
                "inputs": [show(i) for i in batch.inputs[row][inside]],
                "targets": [show(i) if weight else f"({show(i)})" for i, weight in targets],
            }
            if objective.name in EMBEDDING:
                del cells["targets"]
            if batch.prefix is not None:
                cells["prefix"] = ["==" if marked else "" for marked in batch.prefix[row][inside]]
            yield from _align(cells, width)


class _Formatter:
    """Shows ids in printable characters."""

    def __init__(self, objective: Objective, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        names = {number: name for name, number in tokenizer.special_tokens.items()}
        self._names = names | (objective.vocabulary.names if objective.vocabulary else {})

    def __call__(self, token_id: int) -> str:
        token_id = int(token_id)
        if token_id in self._names:
            return self._names[token_id]
        if token_id >= self._tokenizer.vocab_size:
            return f"<{token_id}>"
        piece = self._tokenizer.piece(token_id)
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in piece)
        return "".join(_printable(character) for character in text)


def _printable(character: str) -> str:
    if character == " ":
        return "\u00b7"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _align(cells: dict[str, list[str]], width: int) -> Iterator[str]:
    """Yield labelled lines of cells in columns as wide as their widest cell, broken at `width`."""
    columns = list(zip(*cells.values(), strict=True))
    label = max(map(len, cells)) + 6
    begin = 0
    while begin < len(columns):
        end, free = begin, width - label
        while end < len(columns) and (end == begin or free > max(map(_display_width, columns[end]))):
            free -= 1 + max(map(_display_width, columns[end]))
            end += 1
        widths = [max(map(_display_width, column)) for column in columns[begin:end]]
        for name, values in cells.items():
            padded = (
                value + " " * (size - _display_width(value))
                for value, size in zip(values[begin:end], widths, strict=True)
            )
            yield f"    {name:{label - 4}}{' '.join(padded)}".rstrip()
        if end < len(columns) and len(cells) > 1:
            yield ""
        begin = end


def _display_width(text: str) -> int:
    """The number of columns that a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
