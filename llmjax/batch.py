"""The input and output of every model: packed rows (numpy on the host, arrays on the device) and hidden states."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows. Every field has the batch as its first dimension; an objective leaves those it has no use for None.

    inputs, targets   int32 [batch, seq]; what is read and what is predicted at each place
    weights           float32 [batch, seq]; 0 where the target is not scored (padding, places that are not masked)
    segments          int32 [batch, seq]; 1, 2, ... number the documents of a row, 0 is padding
    positions         int32 [batch, seq]; counted from 0 in each segment
    sample            uint32 [batch, 2]; high and low word of the row's global sample index, which keys all draws
    prefix            bool [batch, seq] or None; places that every place of their segment sees, also those before them
    token_types       int32 [batch, seq] or None (all 0); which of two texts a token belongs to, for encoders
    source, source_segments, source_positions
                      int32 [batch, source_seq] or None; what the encoder of an encoder-decoder reads. Segment n of the
                      rows attends to segment n of the sources
    """

    inputs: Any
    targets: Any
    weights: Any
    segments: Any
    positions: Any
    sample: Any
    prefix: Any = None
    token_types: Any = None
    source: Any = None
    source_segments: Any = None
    source_positions: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a model makes of a batch.

    hidden    [batch, seq, embed] in the compute type, ready for the model's `unembed`
    aux_loss   float32 scalar, added to the summed nats that training lowers, its coefficient included (router losses);
              a sum over rows, so that microbatches and replicas add up
    aux_metrics     name -> (sum, weight), float32 each and sums over rows as well: means that are logged
    """

    hidden: Any
    aux_loss: Any = 0.0
    aux_metrics: Any = dataclasses.field(default_factory=dict)
