"""Measure a unit: read each record and run the stages in order; no threshold is applied."""

import dataclasses
import json
from typing import Any

import numpy as np

from llmjax.atomic import atomic_write, write_bytes
from llmjax.curate.config import CurateConfig, InputConfig
from llmjax.curate.document import EXCERPT, Document, count_tokens, hash_of
from llmjax.curate.engine import stages
from llmjax.curate.engine.measurements import VERSION, Columns, LineWriter, Measurement
from llmjax.curate.filters import personal_data
from llmjax.curate.readers import documents
from llmjax.curate.readers.documents import Record
from llmjax.data.readers.documents import Reject
from llmjax.data.readers.sources import Unit
from llmjax.data.store import minhash, token_store

_MAX_SIZE = (1 << 32) - 1  # bytes of a record that a column holds


def settings_of(config: CurateConfig) -> dict[str, Any]:
    """Settings that measuring depends on, without thresholds; files that they name are included by their hash."""
    return {"version": VERSION, "stages": [(name, stages.STAGES[name].settings(config)) for name in config.stages]}


def key_of(unit: Unit[InputConfig], settings: dict[str, Any]) -> str:
    """A hash of the unit's files and of the settings. The unit's number is not included."""
    files = {"source": unit.source, "kind": unit.kind, "items": repr(unit.items), "state": unit.state}
    input_config = repr(dataclasses.replace(unit.config, weight=None, max_tokens=0))
    return token_store.compute_fingerprint({**settings, "unit": files, "input": input_config})[:24]


def measure(unit: Unit[InputConfig], config: CurateConfig, measurement: Measurement) -> int:
    """Write the files of one unit, the marker last. Returns the number of records."""
    columns, has_signatures = Columns(config.stages), "duplicates" in config.stages
    with (
        atomic_write(measurement.signatures) as signatures,
        atomic_write(measurement.texts) as file,
        LineWriter(file) as texts,
    ):
        for record in documents.read_unit(unit):
            document, early, sizes = _run_stages(record, unit, config)
            if has_signatures:
                signature = np.zeros(minhash.SIZE, np.uint32) if document.signature is None else document.signature
                signatures.write(signature.tobytes())
            columns.add(
                id_hash=hash_of(unit.source, record.id),
                content=document.content or bytes(16),
                sizes=sizes,
                scores=document.scores,
                language=document.language,
                early=early,
            )
            line = {"id": document.id, "notes": document.notes}
            if early:
                line |= {"excerpt": _excerpt(record)}
            else:
                line |= {"text": document.text, "meta": document.meta}
                line |= {"language": document.language} if document.language else {}
            texts.write(line)
    with atomic_write(measurement.columns) as file:
        np.savez(file, **columns.arrays())
    write_bytes(measurement.marker, json.dumps({"records": len(columns)}).encode())
    return len(columns)


def _run_stages(
    record: Record | Reject, unit: Unit[InputConfig], config: CurateConfig
) -> tuple[Document, tuple[str, str] | None, list[tuple[int, int]]]:
    """(the document after its last stage, (stage, reason) if a stage dropped it, bytes and tokens before each stage and
    after the last: 0 after the stage that dropped it)."""
    sizes = [(0, 0)] * (len(config.stages) + 1)
    if isinstance(record, Reject):
        sizes[0] = (min(record.size, _MAX_SIZE), 0)  # what is lost
        return Document(record.id, unit.source, ""), ("read", record.reason), sizes
    repairs = {f"repaired.{name}": count for name, count in record.notes.items()}
    document = Document(record.id, unit.source, record.text, record.kind, record.meta, repairs)
    sizes[0] = sizes[1] = size = _size_of(document.text)
    for index, name in enumerate(config.stages[1:], 1):
        after = stages.STAGES[name].measure(document, config)
        if isinstance(after, str):
            return document, (name, after), sizes
        if after.text is not document.text:
            size = _size_of(after.text)
        document, sizes[index + 1] = after, size
    return document, None, sizes


def _size_of(text: str) -> tuple[int, int]:
    return len(text.encode("utf-8", "surrogatepass")), count_tokens(text)


def _excerpt(record: Record | Reject) -> str:
    """The beginning of a dropped record, for the card."""
    return personal_data.masked_excerpt(record.excerpt if isinstance(record, Reject) else record.text, EXCERPT)
