"""Language identification with the model inside the package py3langid."""

import functools
import re

import py3langid.langid

from llmjax.curate.config import LanguageConfig
from llmjax.errors import UserError, suggest

_DEFAULTS = LanguageConfig()
UNDETERMINED = "und"  # of ISO 639-2
_LETTER = re.compile(r"[^\W\d_]")


def check_config(config: LanguageConfig) -> None:
    """Raise UserError if `keep` has a language that the model cannot detect."""
    codes = {*_model().nb_classes, UNDETERMINED} if config.keep else ()
    for code in config.keep:
        if code not in codes:
            raise UserError(
                f"curate.language.keep={config.keep!r}: no language {code!r}{suggest(str(code), codes)}; use codes of "
                "two letters such as 'en'"
            )


def detect(text: str, config: LanguageConfig = _DEFAULTS) -> tuple[str, float]:
    """(ISO 639 code, probability from 0 to 1); ("und", 0.0) without letters. Of a long text, excerpts are read."""
    sample = select_excerpts(text, config.max_characters, config.num_excerpts)
    if not _LETTER.search(sample):
        return UNDETERMINED, 0.0
    code, confidence = _model().classify(sample)
    return code, min(1.0, confidence)


def select_excerpts(text: str, max_characters: int, num_excerpts: int) -> str:
    """Evenly spaced excerpts, one per line, of at most `max_characters` in total; a shorter text is unchanged."""
    if len(text) <= max_characters:
        return text
    size = max_characters // num_excerpts
    last = len(text) - size
    starts = [last * index // max(1, num_excerpts - 1) for index in range(num_excerpts)]
    return "\n".join(text[start : start + size] for start in starts)


@functools.cache
def _model() -> py3langid.langid.LanguageIdentifier:
    return py3langid.langid.LanguageIdentifier.from_model_file(py3langid.langid.MODEL_FILE, norm_probs=True)
