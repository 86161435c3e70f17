"""What the steps of each phase of a run need: rows, batches, and the optimizer with the phase's learning rate."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.pipeline import DataState, TrainData
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.optim.optimizer import Optimizer
from llmjax.run import config as run_config, phases as run_phases, state as states
from llmjax.run.config import RunConfig
from llmjax.run.phases import Phase
from llmjax.run.state import StateSpec


@dataclasses.dataclass(frozen=True)
class TrainPhase:
    """A phase; phases that read one stream of rows share `objective` and `data`."""

    phase: Phase
    objective: Objective
    data: TrainData
    optimizer: Optimizer

    @property
    def program(self) -> tuple[int, int]:
        """Equal for phases whose steps of one size are one compiled program."""
        return self.phase.rows, self.phase.rates.first


def open_objectives(config: RunConfig, tokenizer: Tokenizer) -> dict[int, Objective]:
    """The objective of each stream of rows, by its number.

    Raises UserError where the special ids of one would mean something else in another.
    """
    phases = {phase.rows: phase for phase in run_phases.split(config)}
    objectives = {rows: run_config.objective(phase.config, tokenizer) for rows, phase in phases.items()}
    longest = max(objectives.values(), key=lambda objective: objective.min_vocab_size)
    for rows, objective in objectives.items():
        ids, others = (each.vocabulary.ids if each.vocabulary else () for each in (objective, longest))
        if ids != others[: len(ids)]:
            raise UserError(
                f"phases.{phases[rows].name}: objective.name={config.objective.name!r} has other special ids for rows "
                f"of {phases[rows].config.data.seq_len} tokens than for the others; keep seq_len and target_len"
            )
    return objectives


def open_data(config: RunConfig, objectives: dict[int, Objective], store: pathlib.Path) -> dict[int, TrainData]:
    """The training data of each stream of rows, by its number. Raises UserError as `TrainData` does."""
    return {
        phase.rows: TrainData(
            store,
            phase.config.data,
            seed=phase.config.seed,
            global_batch=phase.config.train.global_batch,
            schedule=phase.config.train.batch_schedule,
            objective=objectives[phase.rows],
        )
        for phase in {phase.rows: phase for phase in run_phases.split(config)}.values()
    }


def open_phases(
    config: RunConfig, objectives: dict[int, Objective], data: dict[int, TrainData], spec: StateSpec
) -> tuple[TrainPhase, ...]:
    """The phases in order, on the mesh of `use_mesh`."""
    phases = run_phases.split(config)
    optimizers = {
        phase.rates.first: states.make_trained_optimizer(
            config.model,
            phase.rates.optimizer,
            spec.shapes.params,
            spec.axes,
            horizon=phase.rates.horizon,
            first=phase.rates.first,
        )[1]
        for phase in {phase.rates.first: phase for phase in phases}.values()
    }
    return tuple(
        TrainPhase(phase, objectives[phase.rows], data[phase.rows], optimizers[phase.rates.first]) for phase in phases
    )


def _streams(phases: Sequence[TrainPhase]) -> Iterator[list[TrainPhase]]:
    """The phases of each stream of rows."""
    for _, group in itertools.groupby(phases, lambda each: each.phase.rows):
        yield list(group)


def phase_of(phases: Sequence[TrainPhase], step: int) -> TrainPhase:
    """The phase that a step (from 1) belongs to."""
    return phases[run_phases.at_step([each.phase for each in phases], step)]


def read_batches(
    phases: Sequence[TrainPhase], step: int, state: DataState, rows_of: Callable[[int], np.ndarray]
) -> Iterator[tuple[TrainPhase, Batch, DataState]]:
    """Yield the batches after `step`, each with its phase and the state after it; see `TrainData.batches`.

    state   after `step`; at the end of a phase that of this phase, whatever the next one reads
    """
    for stream in _streams(phases):
        first, last, data = stream[0].phase.first, stream[-1].phase.last, stream[0].data
        if last <= step:
            continue
        batches = data.batches(data.start() if step <= first else state, rows_of)
        for number in range(max(step, first) + 1, last + 1):
            batch, after = next(batches)
            yield phase_of(stream, number), batch, after


def check_length(phases: Sequence[TrainPhase], step: int, last_step: int, state: DataState) -> None:
    """Raise UserError where the data end before `last_step`.

    step, state   from which the run goes on
    """
    for stream in _streams(phases):
        first, last, data = stream[0].phase.first, min(last_step, stream[-1].phase.last), stream[0].data
        if last <= max(first, step):
            continue
        left = data.remaining(data.start() if step <= first else state)
        if left is not None and left < last - max(first, step):
            raise UserError(
                f"train.steps={phases[-1].phase.last}: the data end after {max(first, step) + left - step} more steps; "
                "lower it, or set data.at_source_end='repeat'"
            )


def summarize_data(phases: Sequence[TrainPhase], step: int, state: DataState) -> dict[str, dict[str, Any]]:
    """`TrainData.summary` of the rows of a step, with the samples and epochs of all steps up to there."""
    current = phase_of(phases, step)
    summary = current.data.summary(state)
    streams = {each.phase.rows: each for each in phases if each.phase.rows < current.phase.rows}
    for stream in streams.values():
        used = run_phases.count_samples([each.phase for each in phases], stream.phase.last)
        for source, counts in stream.data.summary(stream.data.after(used)).items():
            summary[source]["samples"] += counts["samples"]
            summary[source]["epochs"] += counts["epochs"]
    return summary
