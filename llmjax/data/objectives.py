"""Objectives: packed rows become the Batch that a model learns from. Pure numpy on the host."""

import numpy as np

from llmjax.batch import Batch
from llmjax.data.packing import Rows


def causal(rows: Rows, samples: np.ndarray) -> Batch:
    """Next-token prediction: every token, the first and the EOS included, is foretold from those before it.

    samples  the rows' global sample indices, int64 [batch]
    """
    return Batch(
        inputs=rows.before,
        targets=rows.tokens,
        weights=(rows.segments > 0).astype(np.float32),
        segments=rows.segments,
        positions=rows.positions,
        sample=np.stack([samples >> 32, samples & 0xFFFFFFFF], axis=-1).astype(np.uint32),
    )
