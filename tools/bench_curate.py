#!/usr/bin/env python3
"""Measure curation on real text, on one core, beside the tools that others use for it.

python tools/bench_curate.py                           the public texts of docs/testdata.md, else the standard library
python tools/bench_curate.py --text='/my/**/*.txt'     your own
python tools/bench_curate.py --rows=scaling,memory     some of the rows
python tools/bench_curate.py --peer_python=PATH        a Python that has the peer, datatrove, installed by
                                                       pip install 'datatrove[io]' spacy ftfy
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import os
from pathlib import Path

from curate_found import duplicate_rows, extraction_rows, personal_rows
from curate_rows import NOT_GIVEN, ROOT, Bench, Row, public_texts, read_jsonl, sample, user_texts
from curate_runs import memory_rows, ray_rows, scaling_rows

from llmjax.curate.filters.language import detect
from llmjax.curate.filters.normalise import normalise
from llmjax.curate.filters.quality import clean_lines, failures, scores, split_words
from llmjax.data.store import minhash


def quality_rows(bench: Bench) -> Iterator[Row]:
    def judged(text: str) -> list[str]:
        return failures(scores(clean_lines(normalise(text)[0])[0]))

    peer = bench.peer("quality", bench.texts)
    theirs = f"{bench.megabytes / peer['seconds']:.2f}" if peer else NOT_GIVEN
    yield Row("clean + quality + repetition, MB/s", bench.rate(judged), theirs, "2")
    kept = [text for text in bench.texts if not judged(text)]
    share = {"documents": len(kept) / len(bench.texts), "characters": sum(map(len, kept)) / sum(map(len, bench.texts))}
    for of, value in share.items():
        yield Row(f"  {of} kept", f"{value:.0%}", f"{peer[of]:.0%}" if peer else NOT_GIVEN)
    yield Row("  normalise alone, MB/s", bench.rate(normalise))
    if theirs := bench.peer("repetition", [(text, split_words(text)) for text in bench.texts]):
        pairs = [
            (name, scores(text)[name], value)
            for text, found in zip(bench.texts, theirs, strict=True)
            for name, value in found.items()
        ]
        # datatrove counts the most frequent run even where it occurs once: next to nothing, but in a very short text.
        same = sum(abs(ours - value) < 1e-9 or (name.startswith("top") and not ours) for name, ours, value in pairs)
        yield Row("  repetition as the peer's, words split alike", f"{same / len(pairs):.2%}", "", "100%")


def language_rows(bench: Bench) -> Iterator[Row]:
    detect("The model is loaded.")
    yield Row("language, MB/s", bench.rate(detect), "", "2")
    if bench.shared:
        pages = read_jsonl(bench.shared / "tldr" / "tldr-12-langs.jsonl.gz")
        right = sum(detect(page["text"])[0] == page["lang"] for page in pages)
        yield Row(f"  right on {len(pages):,} pages in 12 languages", f"{right / len(pages):.3f}", "", "0.99")


def signature_rows(bench: Bench) -> Iterator[Row]:
    def signed(text: str) -> object:
        return minhash.compute_signature(text.encode("utf-8", "replace"))

    peer = bench.peer("signatures", bench.texts)
    yield Row(
        "MinHash signatures, MB/s",
        bench.rate(signed),
        f"{bench.megabytes / peer['seconds']:.2f}" if peer else NOT_GIVEN,
        "8",
    )
    short = [text for text in bench.texts if len(text) < 1000]
    if short:
        yield Row("  of texts below 1,000 characters, MB/s", dataclasses.replace(bench, texts=short).rate(signed))


# Each yields rows of the table; add yours. Those of whole runs come last: they take minutes.
ROWS: list[Callable[[Bench], Iterator[Row]]] = [
    quality_rows,
    language_rows,
    signature_rows,
    duplicate_rows,
    personal_rows,
    extraction_rows,
    scaling_rows,
    ray_rows,
    memory_rows,
]


def main() -> None:
    options = parse_options()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    shared = Path(options.shared) if options.shared else None
    texts = sample(user_texts(options.text) if options.text or not shared else public_texts(shared), options.megabytes)
    bench = Bench(
        shared,
        texts,
        options.repeats,
        options.peer_python,
        run_megabytes=options.run_megabytes,
        memory_megabytes=options.memory_megabytes,
        run_repeats=options.run_repeats,
    )
    print(
        f"{len(texts):,} documents, {bench.megabytes:.1f} MB; one core, by processor time, best of {options.repeats}\n"
    )
    print(f"{'what':56}{'ours':>12}{'peer':>12}{'target':>12}")
    for rows in ROWS:
        if not options.rows or rows.__name__.removesuffix("_rows") in options.rows.split(","):
            for row in rows(bench):
                print(f"{row.what:56}{row.ours:>12}{row.peer:>12}{row.target:>12}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("LLMJAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    default = str(shared) if shared.is_dir() else ""
    where = "folder of the public sets of docs/testdata.md (default: LLMJAX_SHARED_DATA, else ../shared/data)"
    parser.add_argument("--shared", default=default, help=where)
    parser.add_argument("--text", default="", help="glob of UTF-8 files, a document each, instead")
    parser.add_argument("--megabytes", type=float, default=4, help="text to use at most, drawn evenly (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the best counts (default: 5)")
    names = ", ".join(rows.__name__.removesuffix("_rows") for rows in ROWS)
    parser.add_argument("--rows", default="", help=f"which to measure, with commas between (default: all): {names}")
    parser.add_argument("--run_megabytes", type=float, default=30, help="text of a timed whole run (default: 30)")
    parser.add_argument("--run_repeats", type=int, default=2, help="whole runs of which the best counts (default: 2)")
    parser.add_argument(
        "--memory_megabytes", type=float, default=5, help="text that memory is measured on, and on 10x (default: 5)"
    )
    parser.add_argument("--peer_python", default="", help="a Python that has datatrove (default: none)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
