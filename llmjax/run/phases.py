"""The phases of a run: from `phases.NAME.*` to the steps, the rows and the learning rate of each."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import itertools

import numpy as np

from llmjax.data.batches.batch_sizes import MAX_SIZE, locate_batch
from llmjax.data.batches.order import Skips
from llmjax.data.config import LABELLED, SEVERAL_TEXTS
from llmjax.data.hashing import hash64
from llmjax.errors import UserError, suggest
from llmjax.optim import schedules
from llmjax.optim.config import OptimizerConfig
from llmjax.run.config import RunConfig, with_fields
from llmjax.run.phase_config import PhaseConfig

_Entries = list[tuple[str, PhaseConfig]]

FIRST = "first"  # the name of the phase before all that a config names


@dataclasses.dataclass(frozen=True)
class RateSchedule:
    """A schedule of the learning rate, over one phase or several.

    optimizer   whose rate fields are those of the schedule
    first       updates before it
    horizon     updates over which it runs
    """

    optimizer: OptimizerConfig
    first: int
    horizon: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """Successive steps of one run, from `first` + 1 to `last`.

    rows    number of the stream of rows: phases whose rows have one length read on in one order of samples
    config  of the stream, without phases: mixture and batches of its phases are data.weight_schedule and
            train.batch_schedule. `seed`, which keys its order and the draws for its samples, is its own
    steps   config of this phase alone: of `config`, with the batches of its steps
    rates   the schedule of the learning rate in this phase
    """

    name: str
    first: int
    last: int
    rows: int
    config: RunConfig
    steps: RunConfig
    rates: RateSchedule

    @property
    def batch(self) -> int:
        """Rows of a step; of the first one, where train.batch_schedule changes it."""
        return self.steps.train.global_batch

    def __str__(self) -> str:
        rate, first = self.rates.optimizer.resolved(), self.rates.first
        return (
            f"phase {self.name}, steps {self.first + 1:,} to {self.last:,}: {self.batch} rows of "
            f"{self.config.data.seq_len:,} tokens a step; learning rate: {rate.schedule} of steps {first + 1:,} to "
            f"{first + self.rates.horizon:,}, at most {rate.learning_rate:g}"
        )


def split(config: RunConfig) -> list[Phase]:
    """The phases of a run in order; one without a config of phases has one.

    Raises UserError, naming the field, for phases that do not fit the run.
    """
    train = config.train
    if not config.phases:
        rates = RateSchedule(config.optimizer, 0, train.steps)
        return [Phase(FIRST, 0, train.steps, 0, config, config, rates)]
    _check(config)
    entries = [(FIRST, PhaseConfig()), *sorted(config.phases.items(), key=lambda entry: entry[1].after_step)]
    bounds = [*(phase.after_step for _, phase in entries), train.steps]
    streams, rates = _make_streams(config, entries), _make_rates(config, entries)
    return [
        Phase(name, first, last, number, stream, _with_batch(name, stream, batch), schedule)
        for (name, _), (first, last), (number, stream, batch), schedule in zip(
            entries, itertools.pairwise(bounds), streams, rates, strict=True
        )
    ]


def _with_batch(name: str, config: RunConfig, batch: int) -> RunConfig:
    """The config with steps of one size."""
    with naming_phase(name):
        return with_fields(config, [("train.global_batch", batch), ("train.batch_schedule", ())])


def check_rates(config: RunConfig) -> None:
    """Raise UserError where a schedule of the learning rate does not fit into the steps."""
    for phase in split(config):
        with naming_phase(phase.name):
            schedules.make_schedule(phase.rates.optimizer, phase.rates.horizon)


def rate_at(phases: Sequence[Phase], step: int, updates: int) -> float:
    """The learning rate of a step (from 1) that so many updates precede."""
    rates = phases[at_step(phases, step)].rates
    return float(schedules.make_schedule(rates.optimizer, rates.horizon, rates.first)(updates))


@contextlib.contextmanager
def naming_phase(name: str) -> Iterator[None]:
    """Put the name of a phase before the text of a UserError."""
    try:
        yield
    except UserError as error:
        raise error if name == FIRST else UserError(f"phases.{name}: {error}") from error


def at_step(phases: Sequence[Phase], step: int) -> int:
    """The number of the phase that a step (from 1) belongs to; steps after the last one belong to the last phase."""
    return next((number for number, phase in enumerate(phases) if step <= phase.last), len(phases) - 1)


def last_config(config: RunConfig) -> RunConfig:
    """The config with which a run is evaluated, sampled and exported: rows have the length of its last phase."""
    return config if not config.phases else split(config)[-1].config


def largest_config(config: RunConfig) -> RunConfig:
    """The config of the phase with the most tokens in a step, which needs the most memory."""
    tokens = lambda phase: (phase.config.train.batch_sizes.largest * phase.config.data.seq_len, phase.rows)
    return max(split(config), key=tokens).config


def count_samples(phases: Sequence[Phase], step: int) -> int:
    """The samples, without those that are skipped, that the stream of a step's phase has used at the end of it."""
    phase = phases[at_step(phases, step)]
    first = next(each.first for each in phases if each.rows == phase.rows)
    sizes, skips = phase.config.train.batch_sizes, Skips(phase.config.data.skip)
    return locate_batch(list(sizes.stretches(0, skips.count_unskipped)), step - first)[0]


def _check(config: RunConfig) -> None:
    """UserError where `phases` does not fit the rest of the config."""
    train, after = config.train, {}
    for field, value in (
        ("train.epochs", train.epochs),
        ("train.batch_schedule", train.batch_schedule),
        ("data.weight_schedule", config.data.weight_schedule),
    ):
        if value:
            raise UserError(f"{field}={value}: phases begin after given steps; unset it, and give phases what it says")
    for name, phase in config.phases.items():
        field = f"phases.{name}"
        if name == FIRST:
            raise UserError(f"{field}: this is the name of the phase before all others; choose another")
        if not 1 <= phase.after_step < train.steps:
            raise UserError(
                f"{field}.after_step={phase.after_step}: must be from 1 to {train.steps - 1}, below "
                f"train.steps={train.steps}"
            )
        if (other := after.setdefault(phase.after_step, name)) != name:
            raise UserError(f"{field}.after_step={phase.after_step}: phases.{other} begins there, too; merge them")
        for what in ("seq_len", "target_len", "global_batch"):
            value = getattr(phase, what)
            if value is not None and not 1 <= value <= MAX_SIZE:
                raise UserError(f"{field}.{what}={value}: must be from 1 to {MAX_SIZE}")
        if phase.global_batch is not None and phase.global_batch % train.accumulation:
            raise UserError(
                f"{field}.global_batch={phase.global_batch} is not divisible by "
                f"train.accumulation={train.accumulation}: change one of them"
            )
        if phase.changes_rows and config.objective.name in (*LABELLED, *SEVERAL_TEXTS):
            what = "seq_len" if phase.seq_len is not None else "target_len"
            raise UserError(
                f"{field}.{what}={getattr(phase, what)}: objective.name={config.objective.name!r} reads records, which "
                "data.seq_len has cut; unset it"
            )
        with naming_phase(name):
            Skips(phase.skip)
        for source, weight in phase.weights.items():
            if source not in config.data.sources:
                raise UserError(f"{field}.weights.{source}: unknown source{suggest(source, config.data.sources)}")
            if weight < 0:
                raise UserError(f"{field}.weights.{source}={weight}: must be 0 or more")
        if phase.weights and not any(phase.weights.values()):
            raise UserError(f"{field}.weights: all are 0; give at least one source a weight above 0")


@dataclasses.dataclass
class _Stream:
    """Rows of one length in one order of samples, read by successive phases.

    name      of the first of these phases
    used      samples up to the newest phase, without those that are skipped
    sizes     entries of train.batch_schedule
    mixtures  entries of data.weight_schedule
    """

    name: str
    seq_len: int
    target_len: int
    global_batch: int
    weights: dict[str, float]
    skip: tuple
    used: int = 0
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    mixtures: list[tuple[int, tuple]] = dataclasses.field(default_factory=list)

    def config(self, config: RunConfig, number: int) -> RunConfig:
        """The run's config for stream `number`: with its rows, and without phases."""
        data = dataclasses.replace(
            config.data, seq_len=self.seq_len, skip=self.skip, weight_schedule=tuple(self.mixtures)
        )
        if self.weights:
            sources = {
                name: dataclasses.replace(source, weight=self.weights.get(name, 0.0))
                for name, source in data.sources.items()
            }
            data = dataclasses.replace(data, sources=sources)
        return dataclasses.replace(
            config,
            # Another order, and other draws: sample indices start at 0 again.
            seed=int(hash64(np.array([number], np.uint64), np.uint64(config.seed))[0] >> 32) if number else config.seed,
            data=data,
            objective=dataclasses.replace(config.objective, target_len=self.target_len),
            train=dataclasses.replace(config.train, global_batch=self.global_batch, batch_schedule=tuple(self.sizes)),
            phases={},
        )


def _make_streams(config: RunConfig, entries: _Entries) -> list[tuple[int, RunConfig, int]]:
    """(number, config of the stream, rows of a step) of each phase."""
    rows, size = (config.data.seq_len, config.objective.target_len), config.train.global_batch
    weights: dict[str, float] = {}
    streams: list[_Stream] = []
    phases, step = [], 0
    for name, phase in entries:
        if streams:
            streams[-1].used += size * (phase.after_step - step)
        step = phase.after_step
        changed = (phase.seq_len or rows[0], phase.target_len or rows[1])
        new_size, new_weights = phase.global_batch or size, dict(phase.weights) or weights
        if not streams or changed != rows:
            skip = phase.skip if streams else config.data.skip
            streams.append(_Stream(name, *changed, new_size, new_weights, skip))
        elif phase.skip:
            raise UserError(
                f"phases.{name}.skip={phase.skip}: its sample indices go on from those of the phase before; add these "
                "spans to data.skip, or to the skip of the phase that changed the length of rows"
            )
        else:
            start = int(Skips(streams[-1].skip).sample(np.array(streams[-1].used)))
            if new_size != size:
                streams[-1].sizes.append((start, new_size))
            if new_weights != weights:
                streams[-1].mixtures.append((start, tuple(new_weights.items())))
        rows, size, weights = changed, new_size, new_weights
        phases.append((len(streams) - 1, size))
    configs = []
    for number, stream in enumerate(streams):
        with naming_phase(stream.name):
            configs.append(stream.config(config, number))
    return [(number, configs[number], batch) for number, batch in phases]


def _make_rates(config: RunConfig, entries: _Entries) -> list[RateSchedule]:
    """The learning rate schedule of each phase."""
    starts = [phase.after_step for number, (_, phase) in enumerate(entries) if number == 0 or phase.rates]
    ends = dict(zip(starts, [*starts[1:], config.train.steps], strict=True))
    optimizer, result = config.optimizer, []
    for name, phase in entries:
        if phase.after_step not in ends:
            result.append(result[-1])
            continue
        if name != FIRST:
            with naming_phase(name):
                optimizer = dataclasses.replace(optimizer, **{"warmup_steps": 0, **phase.rates})
        result.append(RateSchedule(optimizer, phase.after_step, ends[phase.after_step] - phase.after_step))
    return result
