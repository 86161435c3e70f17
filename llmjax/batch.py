"""What every model reads: one batch of packed rows, the same dataclass on host (numpy) and device."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows. Every field has the batch as its first dimension.

    inputs, targets   int32 [batch, seq]; inputs[i] precedes targets[i] in the same document, or is BOS at its start
    weights           float32 [batch, seq]; 0 where the target is not scored (padding)
    segments          int32 [batch, seq]; 1, 2, ... number the documents of a row, 0 is padding
    positions         int32 [batch, seq]; counted from 0 in each segment
    sample            uint32 [batch, 2]; high and low word of the row's global sample index, which keys all draws
    """

    inputs: Any
    targets: Any
    weights: Any
    segments: Any
    positions: Any
    sample: Any
