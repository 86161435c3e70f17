"""Augmented copies of a document: a pure function of text, seed, copy number and document id.

Words left out and swapped, after Wei and Zou, 2019 (arXiv 1901.11196), who found both to help small training sets.
"""

import re

import numpy as np

from llmjax.curate.config import AugmentConfig
from llmjax.curate.document import hash_of

_WORD = re.compile(r"\S+")


def augment(text: str, *, copy: int, id: str, config: AugmentConfig) -> str:
    """The text with some words left out, some swapped with the next one of their line, spacing kept.

    At least one word stays, and the same arguments always give the same text.
    """
    rng = np.random.Generator(np.random.Philox(key=[config.seed & (1 << 64) - 1, hash_of(id, str(copy))]))
    lines = []
    for line in text.split("\n"):
        words = _WORD.findall(line)
        if not words:
            lines.append(line)
            continue
        spaces = _WORD.split(line)
        swaps = rng.random(len(words)) < config.swap
        for place in np.flatnonzero(swaps[:-1]).tolist():
            words[place], words[place + 1] = words[place + 1], words[place]
        stay = rng.random(len(words)) >= config.drop
        if not stay.any():
            stay[rng.integers(len(words))] = True
        # A word goes with the space after it.
        lines.append(
            spaces[0] + "".join(w + s for w, s, here in zip(words, spaces[1:], stay.tolist(), strict=True) if here)
        )
    made = "\n".join(lines)
    return made.lower() if rng.random() < config.case else made
