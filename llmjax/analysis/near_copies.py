"""Examples of a task that are copies, or near-duplicates, of training texts: MinHash, as in curation and splitting."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from llmjax.data.store import minhash
from llmjax.data.store.split import SIMILARITY


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearCopy:
    """An example, the most similar training text, and the estimated Jaccard similarity of their 5-word shingles."""

    index: int
    train_index: int
    similarity: float


def find_near_copies(train: Sequence[str], texts: Sequence[str]) -> list[NearCopy]:
    """The texts that are similar to a training text (from SIMILARITY), the most similar first.

    Letter case and spacing do not matter. Only pairs that share a band of their signatures are compared: of those with
    a similarity of 0.75 a share of 0.77, of 0.85 a share of 0.99.
    """
    if not train or not texts:
        return []
    left, right = _compute_signatures(train), _compute_signatures(texts)
    best = np.zeros(len(texts))
    best_index = np.zeros(len(texts), np.int64)
    for band in range(minhash.BANDS):
        keys = minhash.hash_band(left, band)
        order = np.argsort(keys, kind="stable")
        wanted = minhash.hash_band(right, band)
        begins = np.searchsorted(keys[order], wanted, "left")
        ends = np.searchsorted(keys[order], wanted, "right")
        for index in np.flatnonzero(ends > begins):
            members = order[begins[index] : ends[index]]
            similarities = (left[members] == right[index]).mean(axis=1)
            place = int(similarities.argmax())
            if similarities[place] > best[index]:
                best[index], best_index[index] = similarities[place], members[place]
    found = np.flatnonzero(best >= SIMILARITY)
    order = found[np.argsort(-best[found], kind="stable")]
    return [NearCopy(index=int(i), train_index=int(best_index[i]), similarity=float(best[i])) for i in order]


def _compute_signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [texts, minhash.SIZE]"""
    parts = [minhash.compute_signature(text.casefold().encode("utf-8", "surrogatepass")) for text in texts]
    return np.stack(parts)
