"""The stages by name: what each measures, and the settings that this depends on.

`Stage.measure` is a pure function of a document and the config. It returns the document, changed or with more scores,
or the reason to drop it regardless of thresholds. Thresholds are applied later.
"""

from collections import Counter
from collections.abc import Callable
import dataclasses
import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

from llmjax.curate.config import CurateConfig
from llmjax.curate.dedup import decontaminate
from llmjax.curate.document import Document, hash_content
from llmjax.curate.filters import classifier, language, normalise, personal_data, quality, terms
from llmjax.curate.readers import html, markup
from llmjax.data.readers import formats, streams
from llmjax.data.store import minhash
from llmjax.errors import UserError

MeasureFn = Callable[[Document, CurateConfig], Document | str]


class Stage(NamedTuple):
    """A step of curation. `settings` returns the part of the config that `measure` depends on."""

    measure: MeasureFn
    settings: Callable[[CurateConfig], Any]


def _keep_unchanged(document: Document, config: CurateConfig) -> Document:
    return document


def _extract(document: Document, config: CurateConfig) -> Document | str:
    page, scores = document.text, {}
    if document.kind == "text":
        return document
    if document.kind == "auto":
        page, scores = markup.detect_html(document.text), {"repair.text extracted from HTML in a field": 1}
        if page is None:
            return dataclasses.replace(document, kind="text")
    text, title = html.extract_main_text(page, str(document.meta.get("url", "")))
    if not text.strip():
        return "no main text"
    meta = document.meta if "title" in document.meta or not title else {**document.meta, "title": title}
    return dataclasses.replace(document, kind="text", meta=meta).with_text(text, **scores)


def _normalise(document: Document, config: CurateConfig) -> Document | str:
    text, counts = normalise.normalise(document.text, config.normalise)
    if not text.strip():
        return "empty"
    return document.with_text(text, **{f"repair.{name}": count for name, count in counts.items()})


def _detect_language(document: Document, config: CurateConfig) -> Document:
    code, confidence = language.detect(document.text, config.language)
    return dataclasses.replace(document, language=code).with_scores({"confidence": confidence})


def _score_quality(document: Document, config: CurateConfig) -> Document | str:
    text, counts = quality.remove_c4_lines(document.text, config.quality)
    if not text.strip():
        return "all lines removed"
    document = document if text == document.text else document.with_text(text)
    scores = {f"lines.{name}": count for name, count in counts.items()} | quality.compute_scores(text)
    if path := config.quality.classifier:
        scores["classifier"] = _load_classifier(path, streams.file_state(path)).score(text)
    return document.with_scores(scores)


@functools.lru_cache(maxsize=1)
def _load_classifier(path: str, _state: tuple[int, int] | None) -> classifier.Classifier:
    return classifier.load(path)


def _compute_signature(document: Document, config: CurateConfig) -> Document:
    signature = minhash.compute_signature(document.text.encode("utf-8", "surrogatepass"))
    return dataclasses.replace(document, content_hash=hash_content(document.text), signature=signature)


def _count_shared_ngrams(document: Document, config: CurateConfig) -> Document:
    counts = decontaminate.count_shared_ngrams(document.text, config.decontaminate)
    return document.with_scores({f"shared_ngrams.{name}": count for name, count in counts.items()})


def _replace_personal_data(document: Document, config: CurateConfig) -> Document:
    text, spans = document.text, personal_data.find_spans(document.text, config.personal_data.kinds)
    if not spans:
        return document
    counts = Counter(span.kind for span in spans)
    contexts = [[span.kind, personal_data.mask_context(text, spans, index)] for index, span in enumerate(spans[:3])]
    document = document.with_scores({f"personal.{kind}": count for kind, count in counts.items()}, personal=contexts)
    return (
        document.with_text(personal_data.replace_spans(text, spans))
        if config.personal_data.action == "replace"
        else document
    )


def _count_terms(document: Document, config: CurateConfig) -> Document:
    counts = terms.count_terms(document.text, config.sample.terms)
    return document.with_scores({f"term.{name}": count for name, count in counts.items()})


def _hash_files(field: str, paths: tuple[str, ...]) -> list[str]:
    """Hashes of the files that curate.FIELD names. Raises UserError for one that cannot be read."""
    hashes = []
    for path in filter(None, paths):
        file = Path(path).expanduser()
        try:
            hashes.append(_hash_file(file, streams.file_state(path)))
        except OSError as error:
            raise UserError(f"curate.{field}: {path!r} cannot be read ({error.strerror}); give a file") from None
    return hashes


@functools.lru_cache(maxsize=256)
def _hash_file(path: Path, _state: tuple[int, int] | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _decontaminate_settings(config: CurateConfig) -> list[Any]:
    """n-gram lengths, and (name, format, hash) of every evaluation set."""
    paths = config.decontaminate.against
    names = decontaminate.name_sets(paths)
    hashes = _hash_files("decontaminate.against", paths)
    kinds = [formats.detect(path, formats.CURATE_FORMATS) for path in paths]
    sets = list(zip(map(names.get, paths), kinds, hashes, strict=True))
    return [sets, config.decontaminate.ngram_words, config.decontaminate.min_words]


def _quality_settings(config: CurateConfig) -> list[Any]:
    """The rules that change the text, and the classifier. All other rules read scores."""
    c = config.quality
    return [
        "c4" in c.rules,
        (c.c4_remove_citations, c.c4_require_terminal_punctuation, c.c4_min_line_words),
        (c.c4_max_word_length, c.c4_remove_javascript, c.c4_remove_policy),
        _hash_files("quality.classifier", (c.classifier,)),
    ]


STAGES: dict[str, Stage] = {
    "read": Stage(_keep_unchanged, lambda c: _version("charset-normalizer")),
    "extract": Stage(_extract, lambda c: html.get_package_versions()),
    "normalise": Stage(_normalise, lambda c: (repr(c.normalise), _version("ftfy"))),
    "language": Stage(
        _detect_language, lambda c: (c.language.max_characters, c.language.num_excerpts, _version("py3langid"))
    ),
    "quality": Stage(_score_quality, _quality_settings),
    "duplicates": Stage(_compute_signature, lambda c: None),
    "decontaminate": Stage(_count_shared_ngrams, _decontaminate_settings),
    "personal_data": Stage(_replace_personal_data, lambda c: repr(c.personal_data)),
    "sample": Stage(_count_terms, lambda c: _hash_files("sample.terms", c.sample.terms)),
    "split": Stage(_keep_unchanged, lambda c: None),
    "augment": Stage(_keep_unchanged, lambda c: None),
}
