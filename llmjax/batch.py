"""The input and output of every model: packed rows (numpy on the host, arrays on the device) and hidden states.

Also the types of a model's two parts: its graph and its parameters.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax

Params = dict[str, Any]  # nested: names of modules -> names of parameters -> arrays, or their shapes or shardings
Graph = nnx.GraphDef  # `nnx.merge(graph, params)` is the model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows. The first dimension of every field is the batch; fields that an objective does not use are None.

    inputs, targets   int32 [batch, seq]; the token that is read and the one to predict at each position
    weights           float32 [batch, seq]; 0 where the target is not scored (padding, positions that are not masked)
    segments          int32 [batch, seq]; 1, 2, ... number the documents of a row, 0 is padding
    positions         int32 [batch, seq]; counted from 0 in each segment
    sample            uint32 [batch, 2]; high and low word of the row's global sample index, which keys all draws
    prefix            bool [batch, seq] or None; positions that every position of their segment attends to, later or not
    token_types       int32 [batch, seq] or None (all 0); which of two texts a token belongs to, for encoders
    source, source_segments, source_positions
                      int32 [batch, source_seq] or None; input of the encoder of an encoder-decoder. Segment n of the
                      rows attends to segment n of the sources
    labels            float32 [batch, seq, outputs] or None (the targets are scored): what the head is to give at each
                      scored position: numbers, or with multi_label 1 for each class that holds and 0 for others
    reference         float32 [batch, 2] or None; log-likelihoods of the chosen and of the rejected answer of each
                      preference under the reference model
    multi_label       bool, fixed when a program is compiled; what `labels` are
    num_texts         int, fixed when a program is compiled: each row is one record of so many texts, and segment n is
                      its n-th text; 0: rows are packed documents
    one_segment       bool, fixed when a program is compiled; True: each row is one segment, and padding at its end
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
    labels: Any = None
    reference: Any = None
    multi_label: bool = dataclasses.field(default=False, metadata={"static": True})
    num_texts: int = dataclasses.field(default=0, metadata={"static": True})
    one_segment: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def causal_segments(self) -> Any:
        """The segments that causal attention must keep apart; None: no text comes after padding or another segment."""
        return None if self.one_segment else self.segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The result of a model for a batch.

    hidden        [batch, seq, embed] in the compute type, the input of the model's `unembed`
    aux_loss      float32 scalar, added to the summed nats of the loss, its coefficient included (router losses);
                  a sum over rows, so that microbatches and replicas add up
    aux_metrics   name -> (sum, weight), float32 each and also sums over rows: their quotients are logged
    """

    hidden: Any
    aux_loss: Any = 0.0
    aux_metrics: Any = dataclasses.field(default_factory=dict)
