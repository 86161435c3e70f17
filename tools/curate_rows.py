"""Shared parts of tools/bench_curate.py: lines of the table, real texts, timings, the peer."""

from collections.abc import Callable
import dataclasses
import functools
import glob
import gzip
import json
import os
from pathlib import Path
import random
import re
import subprocess
import sys
import sysconfig
import time
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not run"  # the peer, without --peer_python


class Row(NamedTuple):
    """A line of the table, with formatted numbers."""

    label: str
    value: str
    peer: str = ""
    target: str = ""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Data and settings of the rows.

    shared            the folder of public data, or None
    texts             documents
    repeats           timings, of which the best counts
    peer_python       a Python with datatrove; empty: none
    run_megabytes     size of the corpus of complete runs
    memory_megabytes  size of the corpus of memory measurements; they are repeated with ten times as much
    run_repeats       complete runs, of which the fastest counts
    """

    shared: Path | None
    texts: list[str]
    repeats: int
    peer_python: str
    run_megabytes: float = 30
    memory_megabytes: float = 5
    run_repeats: int = 2

    @functools.cached_property
    def megabytes(self) -> float:
        return sum(len(text.encode("utf-8", "replace")) for text in self.texts) / 1e6

    def rate(self, function: Callable[[str], object]) -> str:
        """Megabytes of text per second of processor time, for a function of one text."""
        return f"{self.megabytes / best_seconds(lambda: [function(text) for text in self.texts], self.repeats):.1f}"

    def peer(self, task: str, argument: Any) -> Any | None:
        """The result of a task of tools/peer_datatrove.py, None without a peer. Exits if the task fails."""
        if not self.peer_python:
            return None
        command = [self.peer_python, str(ROOT / "tools" / "peer_datatrove.py"), task]
        result = subprocess.run(command, input=json.dumps(argument), capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"--peer_python={self.peer_python}: {task} failed\n{result.stderr[-2000:]}")
        return json.loads(result.stdout.splitlines()[-1])


def public_texts(shared: Path) -> list[str]:
    """Books, Wikipedia, documentation and articles, in documents of the lengths of web texts."""
    rng, texts = random.Random(0), []
    for path in sorted((shared / "gutenberg").glob("*.gz")):
        paragraphs, begin = read_text(path).split("\n\n"), 0
        while begin < len(paragraphs):
            count = rng.choice((3, 10, 40, 200))
            texts.append("\n\n".join(paragraphs[begin : begin + count]))
            begin += count
    for path in sorted((shared / "wikitext2").glob("*.gz")):
        texts += re.split(r"\n (?== [^=])", read_text(path))
    for name in ("peps/peps", "rust-book/rust-book", "tldr/tldr-en", "web-articles/articles"):
        texts += [record["text"] for record in read_jsonl(shared / f"{name}.jsonl.gz")]
    return [text for text in texts if text.strip()]


def user_texts(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern or f"{sysconfig.get_path('stdlib')}/*.py", recursive=True))
    texts = [Path(file).read_text("utf-8", "replace") for file in files if os.path.isfile(file)]
    if not any(texts):
        sys.exit(f"--text={pattern}: no text matches; give a glob such as '/my/texts/**/*.txt'")
    return texts


def sample(texts: list[str], megabytes: float) -> list[str]:
    """A uniform sample of the texts up to a size, the same in every run."""
    selected, remaining = [], megabytes * 1e6
    for text in random.Random(0).sample(texts, len(texts)):
        remaining -= len(text)
        if selected and remaining < 0:
            break
        selected.append(text)
    return selected


def read_text(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace").replace("\r\n", "\n")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(path).split("\n") if line]


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    """The least processor time of several calls."""
    return min(cpu_seconds(function) for _ in range(max(1, repeats)))


def cpu_seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started
