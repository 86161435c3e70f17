"""Decontamination: find documents that share an n-gram with an evaluation set.

Runs of 13 words, as in Brown et al., 2020 (arXiv 2005.14165, appendix C). An example of the set that is shorter
but has at least `min_words` is looked for as a whole; shorter ones say nothing: ordinary text has them by chance.
"""

from collections.abc import Iterator
import functools
import json
from pathlib import Path
import re

import numpy as np

from llmjax.curate.config import DecontaminateConfig
from llmjax.data.readers import formats, records, streams
from llmjax.data.readers.raw_records import ReadOptions
from llmjax.data.store import minhash
from llmjax.errors import UserError

_VAGUE = ("train", "test", "dev", "valid", "validation", "val", "data", "eval", "examples", "questions")
_OPTIONS = ReadOptions(where="curate.decontaminate.against", is_lenient=True)
_MARK = re.compile(r"[^\w\s]|_")


def hits(text: str, config: DecontaminateConfig) -> dict[str, int]:
    """For each set that the text has something of: how many of its runs of words are in the set."""
    words = _words(text)
    found = {}
    for path in config.against:
        count = 0
        for size, grams in _grams(path, streams.file_state(path), config.words, config.min_words).items():
            if words.size >= size:
                runs = minhash.hash_shingles(words, size)
                # Searched, not `np.isin`: that sorts the set anew for every document.
                place = np.minimum(np.searchsorted(grams, runs), grams.size - 1)
                count += int((grams[place] == runs).sum())
        if count:
            found[set_names(config.against)[path]] = count
    return found


def check(config: DecontaminateConfig) -> None:
    """Raises UserError for an evaluation set that cannot be read, or that holds nothing to look for."""
    for path in config.against:
        if not _grams(path, streams.file_state(path), config.words, config.min_words):
            raise UserError(
                f"curate.decontaminate.against names {path!r}: it holds no text of {config.min_words} words "
                "(curate.decontaminate.min_words) or more, so nothing of it would be found"
            )


@functools.lru_cache(maxsize=4)
def set_names(paths: tuple[str, ...]) -> dict[str, str]:
    """What the sets are called: after their files, and after the folder too where a file's name says little."""
    short = {path: Path(path).name.split(".")[0] for path in paths}
    named = {}
    for path, name in short.items():
        alone = list(short.values()).count(name) == 1 and name.lower() not in _VAGUE
        named[path] = name if alone else f"{Path(path).absolute().parent.name}/{name}"
    return {path: name if list(named.values()).count(name) == 1 else path for path, name in named.items()}


def examples(path: str) -> Iterator[str]:
    """The texts of an evaluation set: every text in records of JSON, CSV or Parquet; paragraphs of a text file."""
    file = Path(path).expanduser()
    where = f"curate.decontaminate.against names {path!r}"
    if not file.is_file():
        raise UserError(f"{where}: no such file; give files of the evaluation sets")
    try:
        kind = formats.detect(path, formats.CURATE_FORMATS)
        if kind == "parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from _texts(batch.to_pylist())
            return
        data, _ = _OPTIONS.utf8_blocks(str(file))
        if kind in ("csv", "tsv"):
            for row in records.parse_csv(data, kind, _OPTIONS.max_record_bytes):
                if isinstance(row, records.BadRow):
                    raise ValueError(f"a row that is not {kind.upper()}: {row.reason}")
                yield from row[0]
        elif kind in ("jsonl", "json"):
            split = records.split_json if kind == "json" else streams.split_lines
            for _, value in split(data, max_bytes=_OPTIONS.max_record_bytes):
                if isinstance(value, int):
                    raise ValueError(f"a record of {value:,} bytes")
                if value.strip():
                    yield from _texts(json.loads(value))
        else:
            yield from re.split(r"\n\s*\n", b"".join(data).decode("utf-8", "replace"))
    except (OSError, ValueError, streams.DamageError) as error:
        raise UserError(f"{where}: cannot be read ({error}); give JSONL, JSON, CSV, Parquet or text") from None


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _words(text: str) -> np.ndarray:
    return minhash.hash_words(_MARK.sub(" ", text.casefold()).encode("utf-8", "surrogatepass"))


@functools.lru_cache(maxsize=64)
def _grams(path: str, _state: tuple[int, int] | None, size: int, least: int) -> dict[int, np.ndarray]:
    """Words in a run -> sorted hashes of the set's runs: `size` words, or fewer for examples that have no more."""
    made: dict[int, list[np.ndarray]] = {}
    for example in examples(path):
        words = _words(example)
        if words.size >= least:
            length = min(size, words.size)
            made.setdefault(length, []).append(minhash.hash_shingles(words, length))
    return {length: np.unique(np.concatenate(parts)) for length, parts in sorted(made.items())}
