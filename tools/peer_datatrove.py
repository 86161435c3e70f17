#!/usr/bin/env python3
"""What datatrove does with the texts of tools/bench_curate.py: run by a Python that has it, and by that tool alone.

PYTHON tools/peer_datatrove.py WHAT < given.json     the last line printed is the answer, as JSON
"""

from collections.abc import Callable
import json
import sys
import tempfile
import time
from typing import Any

from datatrove.data import Document  # pyright: ignore[reportMissingImports]  (not in this project's environment)


def quality(texts: list[str]) -> dict[str, float]:
    """FineWeb's order: each step sees what the ones before kept. Seconds of processor time, and fractions kept."""
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

    passes("Loads what is loaded once.")
    started = time.process_time()
    kept = [text for text in texts if passes(text)]
    seconds = time.process_time() - started
    characters = sum(map(len, kept)) / sum(map(len, texts))
    return {"seconds": seconds, "documents": len(kept) / len(texts), "characters": characters}


def repetition(given: list[tuple[str, list[str]]]) -> list[dict[str, float]]:
    """Fractions of characters in repeated runs of words, for each (text, its words)."""
    from datatrove.pipeline.filters import gopher_repetition_filter as gopher  # pyright: ignore[reportMissingImports]

    found = []
    for text, words in given:
        runs = {n: gopher.get_n_grams(words, n) for n in (2, 3, 4)}
        top = {f"top_{n}": gopher.find_top_duplicate(run) / len(text) if run else 0.0 for n, run in runs.items()}
        repeated = {f"repeated_{n}": gopher.find_all_duplicate(words, n) / len(text) for n in range(5, 11)}
        found.append(top | repeated)
    return found


def signatures(texts: list[str]) -> dict[str, Any]:
    """MinHash of 5-word shingles, 14 x 8: seconds of processor time, and of each text the first that it is put with.

    Texts that share a bucket are one cluster, as its later stages have it.
    """
    from datatrove.pipeline.dedup.minhash import (  # pyright: ignore[reportMissingImports]
        MinhashConfig,
        MinhashDedupSignature,
    )
    import xxhash  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        step = MinhashDedupSignature(folder, MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8))
        step._hash_func = lambda run: xxhash.xxh64_intdigest(run.encode())  # it passes text, which xxhash 4 refuses
        step.get_signature(step.get_shingles("Loads what is loaded once, a few words at least."))
        started = time.process_time()
        shingles = [step.get_shingles(text) for text in texts]
        found = [step.get_signature(one) if one.size else [] for one in shingles]
        seconds = time.process_time() - started
    first, seen = list(range(len(texts))), {}

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for index, buckets in enumerate(found):
        for key in enumerate(map(tuple, buckets)):
            one, other = sorted((root(index), root(seen.setdefault(key, index))))
            first[other] = one
    return {"seconds": seconds, "first": [root(index) for index in range(len(texts))]}


WHAT: dict[str, Callable[[Any], Any]] = {"quality": quality, "repetition": repetition, "signatures": signatures}

if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]](json.load(sys.stdin))))
