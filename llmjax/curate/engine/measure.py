"""Measure a unit: read each record and run the stages in order; no threshold is applied."""

import dataclasses
import json
from typing import Any

import numpy as np

from llmjax.atomic import atomic_write, write_bytes
from llmjax.curate.config import CurateConfig
from llmjax.curate.document import EXCERPT, Document, count_tokens, hash_of
from llmjax.curate.engine import stages
from llmjax.curate.engine.measurements import VERSION, Columns, LineWriter, Measured
from llmjax.curate.filters import personal_data
from llmjax.curate.readers import documents
from llmjax.curate.readers.documents import Record
from llmjax.data.readers.documents import Reject
from llmjax.data.readers.sources import Unit
from llmjax.data.store import minhash, token_store


def settings_of(config: CurateConfig) -> dict[str, Any]:
    """What measuring any unit depends on, thresholds being no part. Files that it names are read."""
    return {"version": VERSION, "stages": [(name, stages.STAGES[name].measured(config)) for name in config.stages]}


def key_of(unit: Unit, settings: dict[str, Any]) -> str:
    """Names the measurement of a unit: its files, and what measuring is told. Its number is no part."""
    told = {"source": unit.source, "kind": unit.kind, "items": repr(unit.items), "state": unit.state}
    given = repr(dataclasses.replace(unit.config, weight=None, max_tokens=0))
    return token_store.fingerprint_of({**settings, "unit": told, "input": given})[:24]


def measure(unit: Unit, config: CurateConfig, measured: Measured) -> int:
    """Write the files of one unit, the marker last. Returns the number of records."""
    columns, signs = Columns(config.stages), "duplicates" in config.stages
    with (
        atomic_write(measured.signatures) as signatures,
        atomic_write(measured.texts) as file,
        LineWriter(file) as texts,
    ):
        for record in documents.read_unit(unit):
            document, early, sizes = _through(record, unit, config)
            if signs:
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
            told = {"id": document.id, "notes": document.notes}
            if early:
                texts.write(told | {"excerpt": _excerpt(record)})
            else:
                told |= {"text": document.text, "meta": document.meta}
                texts.write(told | ({"language": document.language} if document.language else {}))
    with atomic_write(measured.columns) as file:
        np.savez(file, **columns.arrays())  # type: ignore[arg-type]
    write_bytes(measured.marker, json.dumps({"records": len(columns)}).encode())
    return len(columns)


def _through(
    record: Record | Reject, unit: Unit, config: CurateConfig
) -> tuple[Document, tuple[str, str] | None, list[tuple[int, int]]]:
    """(the document as far as it came, (stage, reason) where it was dropped on the way, bytes and tokens before each
    stage and after the last: 0 from where it was dropped)."""
    sizes = [(0, 0)] * (len(config.stages) + 1)
    if isinstance(record, Reject):
        sizes[0] = (record.size, 0)  # what is lost
        return Document(record.id, unit.source, ""), ("read", record.reason), sizes
    mended = {f"mended.{what}": count for what, count in record.notes.items()}
    document = Document(record.id, unit.source, record.text, record.kind, record.meta, mended)
    sizes[0] = sizes[1] = size = _size(document.text)
    for place, name in enumerate(config.stages[1:], 1):
        after = stages.STAGES[name].measure(document, config)
        if isinstance(after, str):
            return document, (name, after), sizes
        if after.text is not document.text:
            size = _size(after.text)
        document, sizes[place + 1] = after, size
    return document, None, sizes


def _size(text: str) -> tuple[int, int]:
    return len(text.encode("utf-8", "surrogatepass")), count_tokens(text)


def _excerpt(record: Record | Reject) -> str:
    """The beginning of what was dropped, for the card."""
    return personal_data.shown(record.excerpt if isinstance(record, Reject) else record.text, EXCERPT)
