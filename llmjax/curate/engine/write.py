"""Write the documents of a unit: kept ones by split, dropped ones with stage and reason."""

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
from llmjax.curate.document import EXCERPT
from llmjax.curate.engine.decide import KEPT
from llmjax.curate.engine.measurements import LineWriter, Measurement
from llmjax.curate.filters import augment
from llmjax.curate.filters.personal_data import masked_excerpt
from llmjax.data.store.split import SPLITS


@dataclasses.dataclass(frozen=True)
class Task:
    """One unit's share of the decisions.

    name             of its files, such as web-00003
    stage, reason    int [records], see decide.Decisions
    split            uint8 [records]
    samples          rows of records that the card shows
    """

    name: str
    source: str
    measurement: Measurement
    stage: np.ndarray
    reason: np.ndarray
    split: np.ndarray
    samples: frozenset[int]


def write(task: Task, reasons: list[str], config: CurateConfig, folder: Path) -> dict[str, Any]:
    """Write curated/ and dropped/ files of a unit into `folder`; return a summary of them and the sampled records.

    A split without documents has no file.
    """
    samples: dict[str, Any] = {}
    licences, origins = Counter(), Counter()
    with _Files(folder) as files:
        for row, record in enumerate(task.measurement.read_records()):
            if row in task.samples:
                text = masked_excerpt(record["text"], 3 * EXCERPT) if "text" in record else record["excerpt"]
                name = masked_excerpt(record["id"], EXCERPT)
                samples[str(row)] = {"id": name, "text": text, "notes": record["notes"]}
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
                counts[masked_excerpt(str(record["meta"].get(field) or "not given"), 80)] += 1
            if "augment" in config.stages and split == "train":
                for number in range(1, config.augment.copies + 1):
                    text = augment.augment(record["text"], copy=number, id=record["id"], config=config.augment)
                    files.write(name, {**kept, "id": f"{record['id']}~{number}", "text": text})
    result = {"files": files.summary, "samples": samples, "licences": licences, "origins": origins}
    write_bytes(_marker(folder, task.name), json.dumps(result).encode())
    return result


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of `write` for a unit that is written, else None."""
    marker = _marker(folder, name)
    return json.loads(marker.read_text()) if marker.is_file() else None


def _marker(folder: Path, name: str) -> Path:
    """The file that is written last, when all others of the unit are complete."""
    return folder / "done" / f"{name}.json"


class _Files:
    """Opens files when they are needed; at the end all get their names, after an error none."""

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
