"""What all rows of tools/bench_curate.py rest on: the table's lines, real texts, timings, the peer."""

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
NOT_GIVEN = "not given"


class Row(NamedTuple):
    """A line of the table; numbers are written as they are to be read."""

    what: str
    ours: str
    peer: str = ""
    target: str = ""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the rows are measured on.

    shared       the folder of public data, or None where it is absent
    texts        documents
    repeats      timings of which the best counts
    peer_python  a Python that has datatrove; empty: none
    run_megabytes, memory_megabytes  what whole runs are timed on; what memory is measured on, and on ten times as much
    run_repeats  whole runs of which the fastest counts
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

    def rate(self, work: Callable[[str], object]) -> str:
        """Megabytes of the texts a second of processor time, done one by one."""
        return f"{self.megabytes / best(lambda: [work(text) for text in self.texts], self.repeats):.1f}"

    def peer(self, what: str, given: Any) -> Any | None:
        """What `tools/peer_datatrove.py` answers, or None without a peer. Stops the program where it fails."""
        if not self.peer_python:
            return None
        command = [self.peer_python, str(ROOT / "tools" / "peer_datatrove.py"), what]
        done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"--peer_python={self.peer_python}: {what} failed\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def public_texts(shared: Path) -> list[str]:
    """Books, Wikipedia, documentation and articles, cut into documents of the lengths that texts on the web have."""
    draw, texts = random.Random(0), []
    for path in sorted((shared / "gutenberg").glob("*.gz")):
        paragraphs, begin = read_text(path).split("\n\n"), 0
        while begin < len(paragraphs):
            count = draw.choice((3, 10, 40, 200))
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
    """Some of the texts, up to a size, drawn evenly and always alike."""
    texts, chosen, left = random.Random(0).sample(texts, len(texts)), [], megabytes * 1e6
    for text in texts:
        left -= len(text)
        if chosen and left < 0:
            break
        chosen.append(text)
    return chosen


def read_text(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace").replace("\r\n", "\n")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(path).split("\n") if line]


def best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of processor time, the least of some."""
    return min(cpu_seconds(work) for _ in range(max(1, repeats)))


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
