"""Decontamination: count the word n-grams that a document shares with evaluation sets.

An n-gram has 13 words, as in Brown et al., 2020 (arXiv 2005.14165, appendix C). A shorter example of at least
`min_words` is matched as a whole. Even shorter ones are ignored: ordinary text contains them by chance.
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

# File names that do not identify a set.
_GENERIC_NAMES = ("train", "test", "dev", "valid", "validation", "val", "data", "eval", "examples", "questions")
_OPTIONS = ReadOptions(where="curate.decontaminate.against", is_lenient=True)
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def count_shared_ngrams(text: str, config: DecontaminateConfig) -> dict[str, int]:
    """Name of a set -> number of the text's n-grams that are in the set, without zeros."""
    words = _hash_words(text)
    counts = {}
    for path in config.against:
        count = 0
        for size, set_ngrams in _load_ngrams(path, config).items():
            if words.size >= size:
                ngrams = minhash.hash_shingles(words, size)
                # `np.isin` would sort the set again for every document.
                index = np.minimum(np.searchsorted(set_ngrams, ngrams), set_ngrams.size - 1)
                count += int((set_ngrams[index] == ngrams).sum())
        if count:
            counts[name_sets(config.against)[path]] = count
    return counts


def check_evaluation_sets(config: DecontaminateConfig) -> None:
    """Raise UserError for an evaluation set that cannot be read, or that has no n-grams."""
    for path in config.against:
        if not _load_ngrams(path, config):
            raise UserError(
                f"curate.decontaminate.against: {path!r} contains no text of at least {config.min_words} words "
                "(curate.decontaminate.min_words), so it would match nothing"
            )


@functools.lru_cache(maxsize=4)
def name_sets(paths: tuple[str, ...]) -> dict[str, str]:
    """Path -> name of the set: the file name, with the folder if it is not unique or generic, else the path."""
    stems = {path: Path(path).name.split(".")[0] for path in paths}
    names = {}
    for path, stem in stems.items():
        is_unique = list(stems.values()).count(stem) == 1 and stem.lower() not in _GENERIC_NAMES
        names[path] = stem if is_unique else f"{Path(path).absolute().parent.name}/{stem}"
    return {path: name if list(names.values()).count(name) == 1 else path for path, name in names.items()}


def read_examples(path: str) -> Iterator[str]:
    """The texts of an evaluation set: all strings in records of JSON, CSV or Parquet; the paragraphs of a text file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"curate.decontaminate.against: {path!r} does not exist; give files of evaluation sets")
    try:
        kind = formats.detect(str(file), formats.CURATE_FORMATS)
        if kind == formats.UNSUPPORTED:
            raise ValueError(formats.explain_unsupported(str(file), is_lenient=True))
        if kind == "parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from _iterate_strings(batch.to_pylist())
            return
        data, _ = _OPTIONS.utf8_blocks(str(file))
        if kind in ("csv", "tsv"):
            for row in records.parse_csv(data, kind, _OPTIONS.max_record_bytes):
                if isinstance(row, records.BadRow):
                    raise ValueError(f"not {kind.upper()}: {row.reason}")
                yield from row[0]
        elif kind in ("jsonl", "json"):
            split_records = records.split_json if kind == "json" else streams.split_lines
            for _, value in split_records(data, max_bytes=_OPTIONS.max_record_bytes):
                if isinstance(value, int):
                    raise ValueError(f"a record of {value:,} bytes")
                if value.strip():
                    yield from _iterate_strings(json.loads(value))
        else:
            yield from re.split(r"\n\s*\n", b"".join(data).decode("utf-8", "replace"))
    except (OSError, ValueError, streams.DamageError) as error:
        raise UserError(
            f"curate.decontaminate.against: {path!r} cannot be read ({error}); give JSONL, JSON, CSV, Parquet or text"
        ) from None


def _iterate_strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iterate_strings(item)


def _hash_words(text: str) -> np.ndarray:
    return minhash.hash_words(_PUNCTUATION.sub(" ", text.casefold()).encode("utf-8", "surrogatepass"))


def _load_ngrams(path: str, config: DecontaminateConfig) -> dict[int, np.ndarray]:
    """n -> sorted hashes of the set's n-grams: of `ngram_words`, and of fewer for shorter examples."""
    return _hash_ngrams(path, streams.file_state(path), config.ngram_words, config.min_words)


@functools.lru_cache(maxsize=64)
def _hash_ngrams(path: str, _state: tuple[int, int] | None, max_size: int, min_words: int) -> dict[int, np.ndarray]:
    by_size: dict[int, list[np.ndarray]] = {}
    for example in read_examples(path):
        words = _hash_words(example)
        if words.size >= min_words:
            size = min(max_size, words.size)
            by_size.setdefault(size, []).append(minhash.hash_shingles(words, size))
    return {size: np.unique(np.concatenate(parts)) for size, parts in sorted(by_size.items())}
