"""Augmented copies of a document: a pure function of text, seed, copy number and document id.

Dropped and swapped words, as in Wei and Zou, 2019 (arXiv 1901.11196), who found both to help on small training sets.
"""

import itertools
import re

import numpy as np

from llmjax.curate.config import AugmentConfig
from llmjax.curate.document import stable_hash

_WORD = re.compile(r"\S+")


def change_text(text: str, *, copy: int, id: str, config: AugmentConfig) -> str:
    """The text with some words dropped and some swapped with the next word of the line; spacing and line ends stay.

    Every line keeps at least one word. Equal arguments give an equal text.
    """
    rng = np.random.Generator(np.random.Philox(key=[config.seed & (1 << 64) - 1, stable_hash(id, str(copy))]))
    lines = []
    for line in text.split("\n"):
        words = _WORD.findall(line)
        if not words:
            lines.append(line)
            continue
        spaces = _WORD.split(line)
        swaps = rng.random(len(words)) < config.swap
        for index in np.flatnonzero(swaps[:-1]).tolist():
            words[index], words[index + 1] = words[index + 1], words[index]
        is_kept = rng.random(len(words)) >= config.drop
        if not is_kept.any():
            is_kept[rng.integers(len(words))] = True
        # A word is dropped together with the space after it.
        tokens = [word + space for word, space in zip(words, spaces[1:], strict=True)]
        lines.append(spaces[0] + "".join(itertools.compress(tokens, is_kept.tolist())))
    changed = "\n".join(lines)
    return changed.lower() if rng.random() < config.lowercase else changed
