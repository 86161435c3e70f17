#!/usr/bin/env python3
"""Run datatrove on the texts of tools/bench_curate.py, which starts this script with a Python that has datatrove.

PYTHON tools/peer_datatrove.py TASK < argument.json     prints the result as JSON in the last line
"""

from collections.abc import Callable
import json
import sys
import tempfile
import time
from typing import Any

from datatrove.data import Document  # pyright: ignore[reportMissingImports]  (not in this project's environment)


def quality(texts: list[str]) -> dict[str, float]:
    """Filters in FineWeb's order. Processor time, and the kept fractions of documents and characters."""
    from datatrove.pipeline.filters import (  # pyright: ignore[reportMissingImports]
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import FTFYFormatter  # pyright: ignore[reportMissingImports]

    formatter = FTFYFormatter()
    filters = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]

    def passes(text: str) -> bool:
        document = Document(text=formatter.format(text), id="")
        return all(step.filter(document) is True for step in filters)

    passes("This loads the models.")
    started = time.process_time()
    kept = [text for text in texts if passes(text)]
    seconds = time.process_time() - started
    characters = sum(map(len, kept)) / sum(map(len, texts))
    return {"seconds": seconds, "documents": len(kept) / len(texts), "characters": characters}


def repetition(texts: list[tuple[str, list[str]]]) -> list[dict[str, float]]:
    """Fractions of characters in repeated n-grams, for each (text, its words)."""
    from datatrove.pipeline.filters import gopher_repetition_filter as gopher  # pyright: ignore[reportMissingImports]

    scores = []
    for text, words in texts:
        ngrams = {n: gopher.get_n_grams(words, n) for n in (2, 3, 4)}
        top = {f"top_{n}gram": gopher.find_top_duplicate(g) / len(text) if g else 0.0 for n, g in ngrams.items()}
        duplicate = {f"duplicate_{n}gram": gopher.find_all_duplicate(words, n) / len(text) for n in range(5, 11)}
        scores.append(top | duplicate)
    return scores


def signatures(texts: list[str]) -> dict[str, Any]:
    """MinHash of 5-word shingles, 14 x 8: processor time, and for each text the first one of its cluster.

    Texts that share a bucket are in one cluster, as in the later stages of datatrove.
    """
    from datatrove.pipeline.dedup.minhash import (  # pyright: ignore[reportMissingImports]
        MinhashConfig,
        MinhashDedupSignature,
    )
    import xxhash  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        step = MinhashDedupSignature(folder, MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8))
        step._hash_func = lambda shingle: xxhash.xxh64_intdigest(
            shingle.encode()
        )  # datatrove passes str, which xxhash 4 refuses
        step.get_signature(step.get_shingles("This loads the models, with a few words at least."))
        started = time.process_time()
        shingles = [step.get_shingles(text) for text in texts]
        signatures = [step.get_signature(values) if values.size else [] for values in shingles]
        seconds = time.process_time() - started
    first, owners = list(range(len(texts))), {}

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for index, buckets in enumerate(signatures):
        for key in enumerate(map(tuple, buckets)):
            low, high = sorted((root(index), root(owners.setdefault(key, index))))
            first[high] = low
    return {"seconds": seconds, "first": [root(index) for index in range(len(texts))]}


TASKS: dict[str, Callable[[Any], Any]] = {"quality": quality, "repetition": repetition, "signatures": signatures}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](json.load(sys.stdin))))
