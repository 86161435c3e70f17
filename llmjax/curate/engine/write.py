"""Write the documents of a unit: kept ones by split, dropped ones with the stage and the reason."""

from collections import Counter
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.atomic import atomic_write, write_bytes
from llmjax.curate.config import CurateConfig
from llmjax.curate.document import EXCERPT, NOT_STATED
from llmjax.curate.engine.decide import KEPT
from llmjax.curate.engine.measurements import LineWriter, Measurement
from llmjax.curate.filters import augment
from llmjax.curate.filters.personal_data import mask_excerpt
from llmjax.data.store.split import SPLITS


@dataclasses.dataclass(frozen=True)
class Task:
    """The decisions on one unit.

    name                  prefix of its files, such as web-00003
    stage, reason, split  int [records], see decide.Decisions
    sampled_rows          records that the card shows
    """

    name: str
    source: str
    measurement: Measurement
    stage: np.ndarray
    reason: np.ndarray
    split: np.ndarray
    sampled_rows: frozenset[int]


def write(task: Task, reasons: list[str], config: CurateConfig, folder: Path) -> dict[str, Any]:
    """Write the files of a unit to `folder`/curated and /dropped; return their summaries and the sampled records.

    A split without documents has no file.
    """
    samples: dict[str, Any] = {}
    licences, origins = Counter(), Counter()
    with _Files(folder) as files:
        for row, record in enumerate(task.measurement.read_records()):
            if row in task.sampled_rows:
                text = mask_excerpt(record["text"], 3 * EXCERPT) if "text" in record else record["excerpt"]
                id = mask_excerpt(record["id"], EXCERPT)
                samples[str(row)] = {"id": id, "text": text, "notes": record["notes"]}
            if task.stage[row] != KEPT:
                stage, reason = config.stages[task.stage[row]], reasons[task.reason[row]]
                dropped = {"id": record["id"], "stage": stage, "reason": reason, "source": task.source}
                files.write(f"dropped/{task.name}.jsonl.zst", dropped)
                continue
            split = SPLITS[task.split[row]] if task.split[row] < len(SPLITS) else ""
            name = f"curated/{task.name}{f'-{split}' if split else ''}.jsonl.zst"
            kept = {"id": record["id"], "text": record["text"], "source": task.source}
            for field, value in (("split", split), ("language", record.get("language")), ("meta", record["meta"])):
                kept |= {field: value} if value else {}
            files.write(name, kept)
            for counts, field in ((licences, "licence"), (origins, "origin")):
                counts[mask_excerpt(str(record["meta"].get(field) or NOT_STATED), 80)] += 1
            if "augment" in config.stages and split == "train":
                for number in range(1, config.augment.copies + 1):
                    text = augment.change_text(record["text"], copy=number, id=record["id"], config=config.augment)
                    files.write(name, {**kept, "id": f"{record['id']}~{number}", "text": text})
    result = {"files": files.summary, "samples": samples, "licences": licences, "origins": origins}
    write_bytes(_marker(folder, task.name), json.dumps(result).encode())
    return result


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of `write` for a unit that is complete, else None."""
    marker = _marker(folder, name)
    return json.loads(marker.read_text()) if marker.is_file() else None


def _marker(folder: Path, name: str) -> Path:
    """The file that marks a complete unit: it is written last."""
    return folder / "complete" / f"{name}.json"


class _Files:
    """Output files, opened at the first write. They get their final names together at the end, or not at all."""

    def __init__(self, folder: Path):
        self._folder, self._stack = folder, contextlib.ExitStack()
        self._writers: dict[str, LineWriter] = {}
        self.documents: Counter[str] = Counter()
        self.summary: dict[str, dict[str, Any]] = {}

    def write(self, name: str, record: dict[str, Any]) -> None:
        if name not in self._writers:
            file = self._stack.enter_context(atomic_write(self._folder / name))
            self._writers[name] = self._stack.enter_context(LineWriter(file))
        self._writers[name].write(record)
        self.documents[name] += 1

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        if exception[0] is None:
            for name, count in sorted(self.documents.items()):
                with open(self._folder / name, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    self.summary[name] = {"documents": count, "bytes": file.tell(), "sha256": digest}
