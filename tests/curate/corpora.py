"""Texts for tests of curation: documents of real prose from Python's help texts, and changed copies of them."""

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
    """Different passages of Python's help texts, of 60 to 300 words."""
    passages, paragraphs = [], []
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            paragraphs.append(" ".join(paragraph.split()))
            if sum(len(part.split()) for part in paragraphs) >= 60:
                passages.append("\n\n".join(paragraphs))
                paragraphs = []
        paragraphs = []
    gopher = QualityConfig(rules=("gopher",))
    good = (
        text
        for text in passages
        if len(text.split()) < 300 and not quality.list_violations(quality.compute_scores(text), gopher)
    )
    return list(dict.fromkeys(good))


def replace_words(text: str, count: int, seed: int) -> str:
    """The text with `count` of its words replaced by others."""
    rng, words = random.Random(seed), text.split(" ")
    for index in rng.sample(range(len(words)), min(count, len(words))):
        words[index] = f"other{rng.randrange(1000)}"
    return " ".join(words)


def write_jsonl(path: pathlib.Path, texts: dict[str, str], **fields: object) -> pathlib.Path:
    """Write JSON lines of texts by id, with the same extra fields in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": name, "text": text, **fields}) + "\n" for name, text in texts.items()))
    return path


def read_records(workdir: pathlib.Path, folder: str = "curated") -> list[dict]:
    """All records of curated/ or dropped/."""
    records = []
    for path in sorted((workdir / folder).rglob("*.jsonl.zst")):
        data = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
        records += map(json.loads, data.decode().splitlines())
    return records


def read_files(workdir: pathlib.Path) -> dict[str, bytes]:
    """Name -> bytes of all files of a corpus."""
    paths = [path for part in ("curated", "dropped") for path in sorted((workdir / part).rglob("*")) if path.is_file()]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def curate_arguments(workdir: pathlib.Path, inputs: dict[str, object], **settings: object) -> list[str]:
    """Arguments of `llmjax curate` for paths by input, and config fields with `__` for each dot."""
    fields = {f"inputs.{name}.path": path for name, path in inputs.items()}
    fields |= {"workers": 2} | {name.replace("__", "."): value for name, value in settings.items()}
    command = ["curate", f"--config={ROOT / 'configs' / 'curate.py'}", f"--workdir={workdir}"]
    return command + [f"--config.curate.{name}={value}" for name, value in fields.items()]
