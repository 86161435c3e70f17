#!/usr/bin/env python3
"""Measure the data engine on real text, on one core, and compare with Grain's packer and bare reads.

python tools/bench_data.py                          the standard library's sources as text
python tools/bench_data.py --text='/my/**/*.txt'    your own
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import glob
import os
from pathlib import Path
import statistics
import sys
import sysconfig
import tempfile
import time

import grain
import numpy as np

from llmjax.data.batches.packing import best_fit, cut_documents
from llmjax.data.batches.pipeline import PackedSource, TrainData
from llmjax.data.batches.rng import CounterRng
from llmjax.data.config import OBJECTIVES, DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.objectives.objective import make_causal_objective, open_objective
from llmjax.data.objectives.row_chunks import build_causal_batch
from llmjax.data.readers.sources import list_units
from llmjax.data.store import stages
from llmjax.data.store.shards import write_shard
from llmjax.data.store.split import TRAIN
from llmjax.data.store.token_store import TokenStore, write_manifest
from llmjax.data.store.tokenizer import Tokenizer, read_tokenizer
from llmjax.data.store.tokenizer_training import train_sentencepiece
from llmjax.data.store.workers import Workers

SEQ_LEN, BATCH = 2048, 8


def main() -> None:
    options = parse_options()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    with tempfile.TemporaryDirectory(prefix="llmjax-bench-") as folder:
        texts = read_texts(options.text, options.megabytes)
        started = time.perf_counter()
        model = train_sentencepiece(texts, algorithm="bpe", vocab_size=options.vocab_size)
        tokenizer = read_tokenizer("sentencepiece", model)
        size = sum(len(text.encode()) for text in texts)
        print(f"{len(texts):,} documents, {size / 1e6:.1f} MB; tokenizer in {time.perf_counter() - started:.0f} s")
        documents = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]
        write_store(Path(folder) / "main" / "train", documents, tokenizer, shards=4)
        write_store(Path(folder) / "thousand" / "train", documents, tokenizer, shards=1000)
        tokens = sum(map(len, documents))
        print(f"{tokens:,} tokens; tokens/s on one core, best of {options.repeats} by processor time of all threads\n")
        print(f"{'':44}{'llmjax':>12}{'peer or limit':>16}   what")
        bench_assembly(Path(folder), options.repeats)
        bench_objectives(Path(folder), tokenizer, options.repeats)
        bench_planning(Path(folder), options.repeats)
        bench_startup(Path(folder))
        if cores:
            os.sched_setaffinity(0, cores)
        bench_prepare(Path(folder), texts, model, tokens, options.repeats)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", default="", help="glob of UTF-8 files, a document each (default: the standard library)"
    )
    parser.add_argument("--megabytes", type=float, default=20, help="text to use at most (default: 20)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer trained for it (default: 8192)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the best counts (default: 5)")
    return parser.parse_args()


def open_data(folder: Path, config: DataConfig) -> TrainData:
    return TrainData(folder, config, seed=0, global_batch=BATCH, objective=make_causal_objective(SEQ_LEN))


def bench_assembly(folder: Path, repeats: int) -> None:
    """Tokens per second: rows to batch, batches through Grain, Grain's packer, and bare reads."""
    for packing in ("best_fit", "concat"):
        config = DataConfig(sources={"main": SourceConfig()}, seq_len=SEQ_LEN, packing=packing)
        source = PackedSource(folder, "main", "train", config)
        rows = np.random.default_rng(0).permutation(source.rows)
        batches = [rows[a : a + BATCH] for a in range(0, len(rows) - BATCH + 1, BATCH)]
        bare = read_windows(source.store)
        ours = rate(lambda b=batches, s=source: [build_causal_batch(s.fill(r), r) for r in b], len(batches), repeats)
        limit = rate(lambda b=bare: [None for _ in b()], source.rows // BATCH, repeats)
        print_row(f"assemble, {packing}, M tokens/s", ours, limit, "limit: memory-mapped windows, ids only")
        for prefetch in (0, 3):
            data = open_data(folder, dataclasses.replace(config, prefetch=prefetch))
            stream = data.batches(data.start(), np.arange)
            through = rate(lambda s=stream: [next(s) for _ in range(200)], 200, repeats)
            data.close()
            peer, density = grain_first_fit(source.store, repeats)
            print_row(
                f"batches through Grain, {packing}, prefetch {prefetch}",
                through,
                peer,
                "peer: Grain's FirstFit, 64 bins; ours >= 25",
            )
        print_row(f"density, {packing}", f"{source.summary()['density']:.4f}", f"{density:.4f}", "peer: the same")


def bench_objectives(folder: Path, tokenizer: Tokenizer, repeats: int) -> None:
    """Tokens of text a second from rows to batch, and how full its rows are, for every objective."""
    configs = [ObjectiveConfig(name=name) for name in OBJECTIVES] + [ObjectiveConfig(name="masked", whole_words=True)]
    for config in configs:
        start = -1 if config.name in ("span", "ul2") else None
        objective = open_objective(config, tokenizer, seq_len=SEQ_LEN, start_id=start)
        source = PackedSource(folder, "main", "train", DataConfig(seq_len=SEQ_LEN), objective.row_budget)
        rows = np.random.default_rng(0).permutation(source.rows)
        batches, rng = [rows[a : a + BATCH] for a in range(0, len(rows) - BATCH + 1, BATCH)], CounterRng(0)
        work = lambda b=batches, s=source, o=objective, g=rng: [o.build_batch(s.fill(r), r, g) for r in b]
        text = source.store.tokens / (source.rows * SEQ_LEN)
        built = work()
        full = {"positions": np.mean([batch.segments > 0 for batch in built])}
        if built[0].source is not None:
            full["source"] = np.mean([batch.source_segments > 0 for batch in built])
        listed = ", ".join(f"{what} {share:.4f}" for what, share in full.items())
        print_row(
            f"assemble, {objective.fingerprint[:30]}", rate(work, len(batches), repeats, text), "", f"full: {listed}"
        )


def grain_first_fit(store: TokenStore, repeats: int) -> tuple[str, float]:
    """Grain's own on-the-fly packer over the same chunks in memory, shuffled, batched: its rate and density."""
    starts, lengths, _ = cut_documents(store.starts(), store.lengths(), SEQ_LEN)
    chunks = [{"tokens": store.read(start, length)} for start, length in zip(starts, lengths, strict=True)]
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(chunks).shuffle(seed=0).to_iter_dataset(options)
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset, length_struct={"tokens": SEQ_LEN}, num_packing_bins=64
    ).batch(BATCH)
    best, density = float("inf"), 0.0
    for _ in range(max(2, repeats // 2)):
        started, tokens, positions = time.process_time(), 0, 0
        for batch in packed:
            segments = batch["tokens_segment_ids"]
            tokens, positions = tokens + int((segments > 0).sum()), positions + segments.size
        best, density = min(best, (time.process_time() - started) / tokens), tokens / positions
    return f"{1 / best / 1e6:.1f}", density


def read_windows(store: TokenStore) -> Callable[[], Iterator[np.ndarray]]:
    """Random windows of a memory-mapped shard, in int32 batches: the limit of reading alone."""
    tokens = np.memmap(store.folder / "tokens-00000.bin", store.dtype, "r")
    rng = np.random.default_rng(0)

    def read() -> Iterator[np.ndarray]:
        for _ in range(store.tokens // SEQ_LEN // BATCH):
            starts = rng.integers(0, len(tokens) - SEQ_LEN, BATCH)
            yield np.stack([tokens[start : start + SEQ_LEN] for start in starts]).astype(np.int32)

    return read


def bench_planning(folder: Path, repeats: int) -> None:
    store = TokenStore(folder / "main" / "train")
    lengths = np.tile(store.lengths(), 1 + 500_000 // store.documents)
    starts = np.cumsum(lengths) - lengths

    def plan() -> int:
        _, chunks, _ = cut_documents(starts, lengths, SEQ_LEN)
        best_fit(chunks, SEQ_LEN)
        return len(chunks)

    seconds = min(cpu_seconds(plan) for _ in range(repeats))
    print_row("packing plan, M chunks/s", f"{plan() / seconds / 1e6:.1f}", "", "the text repeated to 500,000 documents")


def bench_startup(folder: Path) -> None:
    """Time from opening to the first batch, and time to resume at a high sample index."""
    config = DataConfig(sources={"thousand": SourceConfig()}, seq_len=SEQ_LEN)
    open_data(folder, config)  # writes the plan

    def open_and_read() -> None:
        data = open_data(folder, config)
        next(data.batches(data.start(), np.arange))
        data.close()

    seconds = statistics.median(wall_seconds(open_and_read) for _ in range(5))
    print_row("open 1,000 shards to first batch, ms", f"{1e3 * seconds:.0f}", "500", "the target")
    mixed = {"main": SourceConfig(weight=0.7), "thousand": SourceConfig(weight=0.3)}

    def resume() -> float:
        data = open_data(folder, DataConfig(sources=mixed, seq_len=SEQ_LEN))
        seconds = wall_seconds(lambda: next(data.batches(data.at(10**9), np.arange)))
        data.close()
        return seconds

    print_row(
        "resume at sample 10^9, two sources, ms",
        f"{1e3 * statistics.median(resume() for _ in range(5)):.1f}",
        "50",
        "the target",
    )


def bench_prepare(folder: Path, texts: list[str], model: bytes, tokens: int, repeats: int) -> None:
    """The tokenizing stage of `prepare`, reading and writing included, beside the bare tokenizer; then by two."""
    (folder / "text").mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:06}.txt").write_bytes(text.encode())
    tokenizer = read_tokenizer("sentencepiece", model)
    alone, stage = [], []
    for turn in range(repeats):
        alone.append(cpu_seconds(lambda: tokenizer.encode_batch(texts)))
        tasks = tokenizing_tasks(folder, f"alone-{turn}")
        stage.append(cpu_seconds(lambda t=tasks: [stages.tokenize(*task) for task in t]))
    ours, peer = (f"{tokens / min(seconds) / 1e6:.2f}" for seconds in (stage, alone))
    print_row("tokenize to store, M tokens/s", ours, peer, f"the tokenizer alone: {min(alone) / min(stage):.0%} of it")
    clock = {1: [], 2: []}
    for turn in range(repeats):
        for workers, seconds in clock.items():
            tasks = tokenizing_tasks(folder, f"{workers}-{turn}")
            with Workers(workers) as pool:
                list(pool.map(stages.tokenize, tasks[:1] * workers))  # starts the processes
                seconds.append(wall_seconds(lambda p=pool, t=tasks: list(p.map(stages.tokenize, t[1:]))))
    speedup = f"{min(clock[1]) / min(clock[2]):.2f}"
    print_row(
        "two processes against one, times", speedup, "1.7", f"the target; by the clock, {os.cpu_count()} cores here"
    )


def tokenizing_tasks(folder: Path, name: str) -> list[tuple]:
    """The arguments of `prepare` for `stages.tokenize`, with all documents in the training split."""
    scratch = stages.ScratchDir(folder / f"unfinished-{name}")
    for new in (scratch.folder, folder / f"tokens-{name}"):
        new.mkdir()
    units = list_units("main", SourceConfig(path=f"{folder}/text/*.txt"))
    for unit in units:
        stages.scan(unit, scratch, None, False, stages.Formats())
        splits = np.full(len(scratch.load_scan(unit).sizes), TRAIN, np.uint8)
        np.save(scratch.path("splits", unit, ".npy"), splits)
    model = folder / "tokenizer.model"
    return [(unit, scratch, "sentencepiece", model, folder / f"tokens-{name}", stages.Formats()) for unit in units]


def read_texts(pattern: str, megabytes: float) -> list[str]:
    """UTF-8 files of the pattern, in order, up to a size."""
    files = sorted(glob.glob(pattern or f"{sysconfig.get_paths()['stdlib']}/**/*.py", recursive=True))
    texts: list[str] = []
    remaining = megabytes * 1e6
    for file in files:
        if "site-packages" in file or remaining <= 0 or not os.path.isfile(file):
            continue
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            remaining -= len(text)
    if not texts:
        sys.exit(f"--text={pattern}: no UTF-8 text matches; give a glob such as '/my/texts/**/*.txt'")
    return texts


def write_store(folder: Path, documents: list[np.ndarray], tokenizer: Tokenizer, *, shards: int) -> None:
    infos = [
        write_shard(
            folder,
            index,
            documents[index::shards],
            vocab_size=tokenizer.vocab_size,
            text_bytes=1,
            tokenizer_sha256=tokenizer.sha256,
        )
        for index in range(shards)
    ]
    write_manifest(
        folder,
        infos,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        source=folder.parent.name,
        split=folder.name,
        tokenizer_sha256=tokenizer.sha256,
    )


def rate(work: Callable[[], list], batches: int, repeats: int, share: float = 1.0) -> str:
    """Millions of tokens a second of processor time, all threads together; `share`: tokens per position of a row."""
    work()
    return f"{share * batches * BATCH * SEQ_LEN / min(cpu_seconds(work) for _ in range(repeats)) / 1e6:.1f}"


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def wall_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def print_row(name: str, ours: str, other: str, what: str) -> None:
    print(f"{name:44}{ours:>12}{other:>16}   {what}", flush=True)


if __name__ == "__main__":
    main()
