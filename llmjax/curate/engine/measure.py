"""Measure a unit: read its records and run the stages in order, without thresholds."""

import dataclasses
import json
from typing import Any

import numpy as np

from llmjax.atomic import atomic_write, write_bytes
from llmjax.curate.config import CurateConfig, InputConfig
from llmjax.curate.document import EXCERPT, Document, count_tokens, stable_hash
from llmjax.curate.engine import stages
from llmjax.curate.engine.measurements import VERSION, Columns, LineWriter, Measurement
from llmjax.curate.filters import personal_data
from llmjax.curate.readers import documents
from llmjax.curate.readers.documents import Record
from llmjax.data.readers.documents import Reject
from llmjax.data.readers.sources import Unit
from llmjax.data.store import minhash, token_store

_MAX_SIZE = (1 << 32) - 1  # of a uint32 column


def select_settings(config: CurateConfig) -> dict[str, Any]:
    """The settings that measurements depend on, without thresholds; files in them are represented by their hashes."""
    return {"version": VERSION, "stages": [(name, stages.STAGES[name].settings(config)) for name in config.stages]}


def compute_key(unit: Unit[InputConfig], settings: dict[str, Any]) -> str:
    """A hash of the unit's files and of the settings, but not of the unit's number."""
    files = {"source": unit.source, "kind": unit.kind, "items": repr(unit.items), "state": unit.state}
    input_config = repr(dataclasses.replace(unit.config, weight=None, max_tokens=0))
    return token_store.compute_fingerprint({**settings, "unit": files, "input": input_config})[:24]


def measure(unit: Unit[InputConfig], config: CurateConfig, measurement: Measurement) -> int:
    """Write the measurement of one unit, the marker last. Return the number of records."""
    columns, has_signatures = Columns(config.stages), "duplicates" in config.stages
    with (
        atomic_write(measurement.signatures) as signatures,
        atomic_write(measurement.texts) as file,
        LineWriter(file) as texts,
    ):
        for record in documents.read_unit(unit):
            document, drop, sizes = _run_stages(record, unit, config)
            if has_signatures:
                signature = np.zeros(minhash.SIZE, np.uint32) if document.signature is None else document.signature
                signatures.write(signature.tobytes())
            columns.add(
                id_hash=stable_hash(unit.source, record.id),
                content_hash=document.content_hash or bytes(16),
                sizes=sizes,
                scores=document.scores,
                language=document.language,
                drop=drop,
            )
            line = {"id": document.id, "notes": document.notes}
            if drop:
                text = record.excerpt if isinstance(record, Reject) else record.text
                line |= {"excerpt": personal_data.mask_excerpt(text, EXCERPT)}
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
    """(document after its last stage, (stage, reason) if it was dropped, (bytes, tokens) before each stage and at the
    end; (0, 0) after a drop)."""
    sizes = [(0, 0)] * (len(config.stages) + 1)
    if isinstance(record, Reject):
        sizes[0] = (min(record.size, _MAX_SIZE), 0)
        return Document(record.id, unit.source, ""), ("read", record.reason), sizes
    repairs = {f"repair.{name}": count for name, count in record.notes.items()}
    document = Document(record.id, unit.source, record.text, record.kind, record.meta, repairs)
    sizes[0] = sizes[1] = size = _count_size(document.text)
    for index, name in enumerate(config.stages[1:], 1):
        result = stages.STAGES[name].measure(document, config)
        if isinstance(result, str):
            return document, (name, result), sizes
        if result.text is not document.text:
            size = _count_size(result.text)
        document, sizes[index + 1] = result, size
    return document, None, sizes


def _count_size(text: str) -> tuple[int, int]:
    return len(text.encode("utf-8", "surrogatepass")), count_tokens(text)
