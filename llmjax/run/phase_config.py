"""Config of a phase: what changes in a run after a given step."""

from collections.abc import Mapping
import dataclasses
from typing import Any

# Fields that start a learning rate schedule of the phase's own.
RATE_FIELDS = ("learning_rate", "schedule", "warmup_steps", "decay_fraction", "end_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """What changes after a step of the run; a field that is not set keeps the value of the phase before.

    after_step    the last step before the phase
    seq_len       data.seq_len from here on: texts are packed anew, in a new order, with sample indices from 0
    target_len    objective.target_len from here on, of an encoder-decoder; as seq_len
    global_batch  train.global_batch from here on
    weights       source -> weight in the mixture from here on; a source that is not named has weight 0
    skip          data.skip of the sample indices that start with this phase's seq_len or target_len
    learning_rate, schedule, warmup_steps, decay_fraction, end_fraction
                  as in section optimizer: if any is set, a new schedule of the learning rate starts here. Its horizon
                  is the steps to the next phase with a schedule of its own, or to the end, and it has no warmup unless
                  warmup_steps is set. If none is set, the schedule of the phase before goes on
    """

    after_step: int = 0
    seq_len: int | None = None
    target_len: int | None = None
    global_batch: int | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    skip: tuple = ()
    learning_rate: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    decay_fraction: float | None = None
    end_fraction: float | None = None

    @property
    def rates(self) -> dict[str, Any]:
        """The fields that start a new learning rate schedule, with their values."""
        return {name: getattr(self, name) for name in RATE_FIELDS if getattr(self, name) is not None}

    @property
    def changes_rows(self) -> bool:
        """Whether rows have another length, so that texts are packed anew."""
        return self.seq_len is not None or self.target_len is not None
