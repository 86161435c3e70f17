"""Texts of JSON lines files, and texts of similar length, computed together."""

from collections.abc import Iterator, Sequence
import json
from pathlib import Path
from typing import Any

from llmjax.errors import UserError

# Rows have a length of 16, 32, 64, ..., and as many as fit into 4096 tokens are computed at a time. Both depend on a
# text's own length alone, and so do the bits of what is computed of it.
_SHORTEST, BATCH_TOKENS = 16, 4096


def read_objects(path: Path, flag: str) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of each line of a JSON lines file that is not empty. UserError names a bad line.

    flag   that names the file
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read ({error.strerror})") from None
    objects = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f'{path}, line {number}: expected a JSON object, such as {{"text": "..."}}')
        objects.append((number, record))
    if not objects:
        raise UserError(f"{flag}={path}: has no lines")
    return objects


def read_texts(path: Path, field: str) -> list[str]:
    """The texts in a field of the file of --input. UserError names the line that has none."""
    texts = []
    for number, record in read_objects(path, "--input"):
        text = record.get(field)
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: has no text in the field {field!r}; name it with --field")
        texts.append(text)
    return texts


def round_length(length: int, multiple: int = 8) -> int:
    """The positions of a padded row: 16, 24, 32, 40, 48, 56, 64, 80, ..., four lengths between powers of two at most.

    multiple   that each of them is of
    """
    step = max(multiple, (1 << (length - 1).bit_length()) // 8)
    return max(_SHORTEST, -(-length // step) * step)


def fill_batches(
    lengths: Sequence[int], spans: Sequence[int], *, rows: int, longest: int, multiple: int = 8
) -> Iterator[tuple[list[int], int, int]]:
    """Yield (indices of some texts, `rows`, positions of a row) in the order of their lengths. Only the last batch has
    rows without a text, and little of a row is padding.

    lengths   positions that each text needs
    spans     what texts whose rows are equally long are ordered by
    longest   the most positions that a row has
    multiple  as of `round_length`
    """
    sizes = [min(round_length(length, multiple), longest) for length in lengths]
    order = sorted(range(len(sizes)), key=lambda index: (sizes[index], spans[index]))
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        yield part, rows, sizes[part[-1]]


def group_by_length(
    lengths: Sequence[int], longest: int | None = None, *, rows: int | None = None, tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], int, int]]:
    """Yield (indices of some texts, rows of their batch, positions of a row); rows without a text are padding.

    lengths   positions that each text needs
    longest   the most positions that a row has; None: no limit
    rows      of every batch; None: as many as fit into `tokens`
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        size = max(_SHORTEST, 1 << (length - 1).bit_length())
        groups.setdefault(size if longest is None else min(size, longest), []).append(index)
    for size, indices in sorted(groups.items()):
        count = rows or max(1, tokens // size)
        for start in range(0, len(indices), count):
            yield indices[start : start + count], count, size
