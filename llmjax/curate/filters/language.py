"""Language identification with the model inside the package py3langid."""

import functools
import re

import py3langid.langid

from llmjax.curate.config import LanguageConfig
from llmjax.errors import UserError, suggest

_DEFAULTS = LanguageConfig()
UNDETERMINED = "und"  # of ISO 639-2
_LETTER = re.compile(r"[^\W\d_]")


def check(config: LanguageConfig) -> None:
    """Raises UserError for a language to keep that the model does not know."""
    known = {*_model().nb_classes, UNDETERMINED} if config.keep else ()
    for code in config.keep:
        if code not in known:
            raise UserError(
                f"curate.language.keep={config.keep!r}: no language {code!r}{suggest(str(code), known)}; give codes of "
                "two letters such as 'en'"
            )


def detect(text: str, config: LanguageConfig = _DEFAULTS) -> tuple[str, float]:
    """(code of ISO 639, probability from 0 to 1); ("und", 0.0) for a text without letters where it was read.

    Of a long text, pieces spread evenly from its beginning to its end are read: always the same ones.
    """
    sample = excerpt(text, config.characters, config.places)
    if not _LETTER.search(sample):
        return UNDETERMINED, 0.0
    code, confidence = _model().classify(sample)
    return code, min(1.0, confidence)


def excerpt(text: str, characters: int, places: int) -> str:
    """At most so many characters, in pieces that are spread evenly; the whole text where it is no longer."""
    if len(text) <= characters:
        return text
    size = characters // places
    last = len(text) - size
    starts = [last * place // max(1, places - 1) for place in range(places)]
    return "\n".join(text[start : start + size] for start in starts)


@functools.cache
def _model() -> py3langid.langid.LanguageIdentifier:
    return py3langid.langid.LanguageIdentifier.from_model_file(py3langid.langid.MODEL_FILE, norm_probs=True)
