"""Texts for tests of the data room: real prose that every Python carries, cut into documents, with planted copies."""

import functools
import json
import pathlib
from pydoc_data.topics import topics
import random
import re

import zstandard

from llmjax.curate.filters import quality
from llmjax.curate.filters.quality_config import QualityConfig
from tests import jobs

ROOT = jobs.ROOT


@functools.cache
def documents() -> list[str]:
    """Passages of Python's own help texts, of 60 to 300 words, all different."""
    found, held = [], []
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            held.append(" ".join(paragraph.split()))
            if sum(len(part.split()) for part in held) >= 60:
                found.append("\n\n".join(held))
                held = []
        held = []
    gopher = QualityConfig(rules=("gopher",))
    good = (text for text in found if len(text.split()) < 300 and not quality.failures(quality.scores(text), gopher))
    return list(dict.fromkeys(good))


def changed(text: str, words: int, seed: int) -> str:
    """The text with so many of its words replaced by others."""
    rng, parts = random.Random(seed), text.split(" ")
    for place in rng.sample(range(len(parts)), min(words, len(parts))):
        parts[place] = f"other{rng.randrange(1000)}"
    return " ".join(parts)


def write(path: pathlib.Path, texts: dict[str, str], **fields: object) -> pathlib.Path:
    """JSONL of id -> text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": name, "text": text, **fields}) + "\n" for name, text in texts.items()))
    return path


def records(workdir: pathlib.Path, part: str = "curated") -> list[dict]:
    """All records of curated/ or dropped/, with the file's name as "file"."""
    found = []
    for path in sorted((workdir / part).rglob("*.jsonl.zst")):
        data = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
        found += [{**json.loads(line), "file": path.name} for line in data.decode().splitlines()]
    return found


def files(workdir: pathlib.Path) -> dict[str, bytes]:
    """Name -> bytes of everything that a corpus consists of."""
    paths = [path for part in ("curated", "dropped") for path in sorted((workdir / part).rglob("*")) if path.is_file()]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def arguments(workdir: pathlib.Path, inputs: dict[str, object], **settings: object) -> list[str]:
    """`llmjax curate` on the given paths, with config fields (dots written as two underscores)."""
    fields = {f"inputs.{name}.path": path for name, path in inputs.items()}
    fields |= {"workers": 2} | {name.replace("__", "."): value for name, value in settings.items()}
    command = ["curate", f"--config={ROOT / 'configs' / 'curate.py'}", f"--workdir={workdir}"]
    return command + [f"--config.curate.{name}={value}" for name, value in fields.items()]
