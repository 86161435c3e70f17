#!/usr/bin/env python3
"""Measure curation on real text and compare it with datatrove.

python tools/bench_curate.py                           on the texts of docs/testdata.md, else the standard library
python tools/bench_curate.py --text='/my/**/*.txt'     on your own texts
python tools/bench_curate.py --rows=scaling,memory     only these rows
python tools/bench_curate.py --peer_python=PATH        a Python with datatrove, installed by
                                                       pip install 'datatrove[io]' spacy ftfy
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import os
from pathlib import Path

from curate_recall import duplicate_rows, extraction_rows, personal_rows
from curate_rows import NOT_MEASURED, ROOT, Bench, Row, public_texts, read_jsonl, sample, user_texts
from curate_runs import memory_rows, ray_rows, scaling_rows

from llmjax.curate.filters.language import detect
from llmjax.curate.filters.normalise import normalise
from llmjax.curate.filters.quality import compute_scores, list_violations, remove_c4_lines, split_words
from llmjax.data.store import minhash


def quality_rows(bench: Bench) -> Iterator[Row]:
    def find_violated_rules(text: str) -> list[str]:
        return list_violations(compute_scores(remove_c4_lines(normalise(text)[0])[0]))

    peer = bench.peer("quality", bench.texts)
    peer_rate = f"{bench.megabytes / peer['seconds']:.2f}" if peer else NOT_MEASURED
    yield Row("normalise + quality rules, MB/s", bench.rate(find_violated_rules), peer_rate, "2")
    kept = [text for text in bench.texts if not find_violated_rules(text)]
    shares = {"documents": len(kept) / len(bench.texts), "characters": sum(map(len, kept)) / sum(map(len, bench.texts))}
    for unit, value in shares.items():
        yield Row(f"  {unit} kept", f"{value:.0%}", f"{peer[unit]:.0%}" if peer else NOT_MEASURED)
    yield Row("  normalise alone, MB/s", bench.rate(normalise))
    if peer_scores := bench.peer("repetition", [(text, split_words(text)) for text in bench.texts]):
        pairs = [
            (name, compute_scores(text)[name], value)
            for text, peer_score in zip(bench.texts, peer_scores, strict=True)
            for name, value in peer_score.items()
        ]
        # datatrove counts the most frequent n-gram even if it occurs once.
        same = sum(abs(score - value) < 1e-9 or (name.startswith("top") and not score) for name, score, value in pairs)
        yield Row("  n-gram scores equal to the peer's for the same words", f"{same / len(pairs):.2%}", "", "100%")


def language_rows(bench: Bench) -> Iterator[Row]:
    detect("This loads the model.")
    yield Row("language, MB/s", bench.rate(detect), "", "2")
    if bench.shared:
        pages = read_jsonl(bench.shared / "tldr" / "tldr-12-langs.jsonl.gz")
        num_correct = sum(detect(page["text"])[0] == page["lang"] for page in pages)
        yield Row(f"  correct on {len(pages):,} pages in 12 languages", f"{num_correct / len(pages):.3f}", "", "0.99")


def signature_rows(bench: Bench) -> Iterator[Row]:
    def compute_signature(text: str) -> object:
        return minhash.compute_signature(text.encode("utf-8", "replace"))

    peer = bench.peer("signatures", bench.texts)
    yield Row(
        "MinHash signatures, MB/s",
        bench.rate(compute_signature),
        f"{bench.megabytes / peer['seconds']:.2f}" if peer else NOT_MEASURED,
        "8",
    )
    short = [text for text in bench.texts if len(text) < 1000]
    if short:
        yield Row(
            "  of texts below 1,000 characters, MB/s", dataclasses.replace(bench, texts=short).rate(compute_signature)
        )


# Each yields rows of the table. Complete runs come last, because they take minutes.
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
    print(f"{'row':56}{'llmjax':>12}{'peer':>12}{'target':>12}")
    for rows in ROWS:
        if not options.rows or rows.__name__.removesuffix("_rows") in options.rows.split(","):
            for row in rows(bench):
                print(f"{row.label:56}{row.value:>12}{row.peer:>12}{row.target:>12}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("LLMJAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    default = str(shared) if shared.is_dir() else ""
    where = "folder of the public sets of docs/testdata.md (default: LLMJAX_SHARED_DATA, else ../shared/data)"
    parser.add_argument("--shared", default=default, help=where)
    parser.add_argument("--text", default="", help="glob of UTF-8 files to read instead, each one document")
    parser.add_argument("--megabytes", type=float, default=4, help="maximum size of the sampled texts (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="timings, of which the best counts (default: 5)")
    names = ", ".join(rows.__name__.removesuffix("_rows") for rows in ROWS)
    parser.add_argument("--rows", default="", help=f"rows to measure, separated by commas (default: all): {names}")
    parser.add_argument("--run_megabytes", type=float, default=30, help="text of a complete run (default: 30)")
    parser.add_argument(
        "--run_repeats", type=int, default=2, help="complete runs, of which the best counts (default: 2)"
    )
    parser.add_argument(
        "--memory_megabytes",
        type=float,
        default=5,
        help="text of the memory rows, which are repeated with 10x (default: 5)",
    )
    parser.add_argument("--peer_python", default="", help="a Python with datatrove (default: none)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
