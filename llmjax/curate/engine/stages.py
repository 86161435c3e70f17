"""The stages by name: what each computes for a document, and which settings this depends on.

A stage's `measure` is a pure function of a document and the config. It returns the document, changed or with more
scores, or the reason why it is dropped with any thresholds. Thresholds are applied later.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

from llmjax.curate.config import CurateConfig
from llmjax.curate.dedup import decontaminate
from llmjax.curate.document import Document, content_hash
from llmjax.curate.filters import classifier, language, normalise, personal_data, quality, terms
from llmjax.curate.readers import html, markup
from llmjax.data.readers import formats, streams
from llmjax.data.store import minhash
from llmjax.errors import UserError

MeasureFn = Callable[[Document, CurateConfig], Document | str]


class Stage(NamedTuple):
    """`settings`: the part of the config that `measure` depends on."""

    measure: MeasureFn
    settings: Callable[[CurateConfig], Any]


def _unchanged(document: Document, config: CurateConfig) -> Document:
    return document


def _extract(document: Document, config: CurateConfig) -> Document | str:
    page, scores = document.text, {}
    if document.kind == "text":
        return document
    if document.kind == "auto":
        page, scores = markup.html_of(document.text), {"repaired.text extracted from HTML in a field": 1}
        if page is None:
            return dataclasses.replace(document, kind="text")
    found = html.main_text(page, str(document.meta.get("url", "")))
    if not found.text.strip():
        return "no main text"
    meta = document.meta if "title" in document.meta or not found.title else {**document.meta, "title": found.title}
    return dataclasses.replace(document, kind="text", meta=meta).with_text(found.text, **scores)


def _normalise(document: Document, config: CurateConfig) -> Document | str:
    text, counts = normalise.normalise(document.text, config.normalise)
    if not text.strip():
        return "empty"
    return document.with_text(text, **{f"repaired.{what}": count for what, count in counts.items() if count})


def _language(document: Document, config: CurateConfig) -> Document:
    code, confidence = language.detect(document.text, config.language)
    return dataclasses.replace(document, language=code).with_scores({"confidence": confidence})


def _quality(document: Document, config: CurateConfig) -> Document | str:
    text, counts = quality.clean_lines(document.text, config.quality)
    if not text.strip():
        return "no line left"
    document = document if text == document.text else document.with_text(text)
    lines = {f"lines.{what}": count for what, count in counts.items() if count}
    scores = quality.scores(text)
    if config.quality.classifier:
        path = config.quality.classifier
        scores["classifier"] = _classifier(path, streams.file_state(path)).score(text)
    return document.with_scores({**lines, **scores})


@functools.lru_cache(maxsize=1)
def _classifier(path: str, _state: tuple[int, int] | None) -> classifier.Classifier:
    return classifier.load(path)


def _duplicates(document: Document, config: CurateConfig) -> Document:
    data = document.text.encode("utf-8", "surrogatepass")
    return dataclasses.replace(document, content=content_hash(document.text), signature=minhash.compute_signature(data))


def _decontaminate(document: Document, config: CurateConfig) -> Document:
    hits = decontaminate.hits(document.text, config.decontaminate)
    return document.with_scores({f"contaminated.{name}": count for name, count in hits.items()})


def _personal(document: Document, config: CurateConfig) -> Document:
    spans = personal_data.find(document.text, config.personal_data.kinds)
    if not spans:
        return document
    counts: dict[str, int] = {}
    for span in spans:
        counts[span.kind] = counts.get(span.kind, 0) + 1
    masked = [[span.kind, personal_data.mask(document.text, spans, index)] for index, span in enumerate(spans[:3])]
    document = document.with_scores({f"personal.{kind}": count for kind, count in counts.items()}, personal=masked)
    if config.personal_data.action != "replace":
        return document
    return document.with_text(personal_data.replace(document.text, spans))


def _sample(document: Document, config: CurateConfig) -> Document:
    counts = terms.count(document.text, config.sample.terms)
    return document.with_scores({f"term.{name}": count for name, count in counts.items()})


def _hash_files(field: str, paths: tuple[str, ...]) -> list[str]:
    """Hashes of files that measuring reads, named by curate.FIELD."""
    hashes = []
    for path in filter(None, paths):
        file = Path(path).expanduser()
        try:
            hashes.append(_hash_file(file, streams.file_state(path)))
        except OSError as error:
            raise UserError(f"curate.{field} names {path!r}: cannot be read ({error.strerror}); give a file") from None
    return hashes


@functools.lru_cache(maxsize=256)
def _hash_file(path: Path, _state: tuple[int, int] | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _evaluation_sets(config: CurateConfig) -> list[Any]:
    """(name, format, hash) of every evaluation set."""
    against = config.decontaminate.against
    names = decontaminate.set_names(against)
    hashes = _hash_files("decontaminate.against", against)
    kinds = [formats.detect(path, formats.CURATE_FORMATS) for path in against]
    return list(zip(map(names.get, against), kinds, hashes, strict=True))


def _quality_settings(config: CurateConfig) -> list[Any]:
    """The rules that change the text, and the classifier. All other rules read scores."""
    quality_config = config.quality
    lines = (
        "c4_citations",
        "c4_terminal_punctuation",
        "c4_min_line_words",
        "c4_max_word",
        "c4_javascript",
        "c4_policy",
    )
    return [
        "c4" in quality_config.rules,
        [getattr(quality_config, name) for name in lines],
        _hash_files("quality.classifier", (quality_config.classifier,)),
    ]


# In the order in which they run unless curate.stages says otherwise.
STAGES: dict[str, Stage] = {
    "read": Stage(_unchanged, lambda c: _version("charset-normalizer")),
    "extract": Stage(_extract, lambda c: html.version()),
    "normalise": Stage(_normalise, lambda c: (repr(c.normalise), _version("ftfy"))),
    "language": Stage(_language, lambda c: (c.language.characters, c.language.places, _version("py3langid"))),
    "quality": Stage(_quality, _quality_settings),
    "duplicates": Stage(_duplicates, lambda c: None),
    "decontaminate": Stage(
        _decontaminate,
        lambda c: (_evaluation_sets(c), c.decontaminate.words, c.decontaminate.min_words),
    ),
    "personal_data": Stage(_personal, lambda c: repr(c.personal_data)),
    "sample": Stage(_sample, lambda c: _hash_files("sample.terms", c.sample.terms)),
    "split": Stage(_unchanged, lambda c: None),
    "augment": Stage(_unchanged, lambda c: None),
}
