"""Batches for training and evaluation, through Grain: each batch is a pure function of the data state."""

from collections.abc import Callable, Generator, Iterator, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from pathlib import Path
import sys
from typing import Any
import weakref

import grain
import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.batch_sizes import BatchSizes, Stretch, locate_batch
from llmjax.data.batches.mixture import Mixture
from llmjax.data.batches.order import Permutation, Skips
from llmjax.data.batches.packing import PackingPlan, RowBudget, Rows, fill_rows, join_segments, open_packing
from llmjax.data.batches.rng import CounterRng
from llmjax.data.config import DataConfig
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.token_store import TokenStore
from llmjax.errors import UserError

logger = logging.getLogger(__name__)

_STATE_VERSION = 1
_SPAN = 1024  # samples located at once and cached, so that locating a sample costs little


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataState:
    """The position of training in its data; the same few values on every host.

    version       of this record
    fingerprint   of the training texts, packing, data.seq_len, and the objective unless it is causal, such as
                  "HASH:best_fit:512:masked rate=0.15"
    seed          of the order
    mixture       hash of everything that decides the mixture up to next_sample
    next_sample   global index of the first unused sample; skipped samples count
    global_batch  samples in the last batch
    """

    version: int = _STATE_VERSION
    fingerprint: str
    seed: int
    mixture: str
    next_sample: int
    global_batch: int

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "DataState":
        """Read what `to_json` returned. Raises UserError for another version."""
        if record.get("version") != _STATE_VERSION:
            raise UserError(
                f"data state of version {record.get('version')}: this llmjax reads {_STATE_VERSION}; "
                "resume with the llmjax that wrote the checkpoint"
            )
        return cls(**record)


class PackedSource:
    """One split of one source, packed into rows."""

    def __init__(self, folder: Path, name: str, split: str, config: DataConfig, row_budget: RowBudget | None = None):
        self.name = name
        self.store = TokenStore(Path(folder) / name / split)
        self._row_budget = row_budget or RowBudget(seq_len=config.seq_len)
        longest = self.store.lengths().max(initial=0) if self.store.label_width else 0
        if longest > self._row_budget.longest:  # a label is of a whole document
            raise UserError(
                f"data.seq_len={config.seq_len}: {self.store.folder} holds labelled texts that were prepared for "
                "longer rows; use the data.seq_len that the store was prepared with, or another store"
            )
        self._packing = open_packing(
            self.store, config.seq_len, config.packing, Path(folder) / "plans", self._row_budget
        )
        self.rows = self._packing.rows
        self.reference: np.ndarray | None = None  # float32 [rows, 2], where each row is a preference
        self._is_stream = config.packing == "stream"
        self.scored = self._packing.scored

    def fill(self, rows: np.ndarray) -> Rows:
        """Read these rows, in this order."""
        filled = fill_rows(self.store, self._packing.chunks(rows), len(rows), self._row_budget.capacity)
        if self.reference is not None:
            filled = dataclasses.replace(filled, reference=self.reference[rows])
        return join_segments(filled) if self._is_stream else filled

    def summary(self) -> dict[str, Any]:
        """Counts of the split, and the density of its rows: the fraction of positions that are used.

        Of dialogues also how many of their tokens are scored, and how many dialogues were cut and left out.
        """
        packing, dialogues = self._packing, {}
        if isinstance(packing, PackingPlan) and self.store.has_marks:
            dialogues = {"scored": self.scored, "cut": packing.cut, "left_out": packing.left_out}
        return {
            "documents": self.store.documents,
            "tokens": self.store.tokens,
            "text_bytes": self.store.text_bytes,
            "rows": self.rows,
            "density": packing.used / max(1, self.rows * self._row_budget.seq_len),
            **dialogues,
        }


class TrainData:
    """The training stream of a prepared store: sources mixed, permuted, packed and batched.

    folder        the store
    seed          of the order of samples, and of the objective's draws
    global_batch  samples in a batch of the whole job
    schedule      later sizes of a batch, as train.batch_schedule has them
    objective     turns rows into batches
    Raises UserError for a damaged store, sources without text, and invalid settings.
    """

    def __init__(
        self,
        folder: Path | str,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        schedule: tuple = (),
        objective: Objective,
    ):
        if global_batch < 1:
            raise UserError(f"train.global_batch={global_batch}: expected 1 or more sequences")
        if config.prefetch < 0:
            raise UserError(f"data.prefetch={config.prefetch}: expected 0 or more batches")
        if not config.sources:
            raise UserError("data.sources is empty: give at least one, such as data.sources.main.path")
        self._config, self._seed, self._sizes = config, seed, BatchSizes(global_batch, schedule)
        self._objective, self._rng = objective, CounterRng("objective", seed)
        self._sources = [
            PackedSource(Path(folder), name, "train", config, self._objective.row_budget)
            for name in sorted(config.sources)
        ]
        self._check_dialogues()
        self._mixture = Mixture(
            [source.name for source in self._sources],
            [source.rows for source in self._sources],
            [config.sources[source.name].weight for source in self._sources],
            block=config.mixture_block,
            schedule=config.weight_schedule,
            at_end=config.at_source_end,
            seed=seed,
        )
        self._skips = Skips(config.skip)
        texts = {source.name: source.store.fingerprint for source in self._sources}
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:32]
        self.fingerprint = f"{digest}:{config.packing}:{config.seq_len}"
        if self._objective.fingerprint != "causal":
            self.fingerprint += f":{self._objective.fingerprint}"
        self._locate_span = functools.lru_cache(64)(self._locate_span)
        self._make_order = functools.lru_cache(64)(self._make_order)
        self._streams: weakref.WeakSet[Generator] = weakref.WeakSet()

    def _check_dialogues(self) -> None:
        """Log the dialogues that do not fit rows. Raises UserError if none of a source does."""
        for source in self._sources:
            counts, seq_len = source.summary(), self._config.seq_len
            if counts.get("left_out") and not source.rows:
                raise UserError(
                    f"data.seq_len={seq_len}: no assistant turn of data.sources.{source.name} fits a row; raise it"
                )
            if counts.get("cut") or counts.get("left_out"):
                logger.info(
                    f"{source.name}: dialogues above data.seq_len={seq_len}: {counts['cut']:,} were cut at the end of "
                    f"an assistant turn, {counts['left_out']:,} were left out, since none fits; raise it to keep them"
                )

    @property
    def rows(self) -> int:
        """Rows of all sources, which are read once in an epoch."""
        return sum(source.rows for source in self._sources)

    def add_reference(self, reference: Mapping[tuple[str, str], np.ndarray]) -> None:
        """Give each row the log-likelihoods of its answers: (source, split) -> float32 [rows, 2]."""
        for source in self._sources:
            source.reference = reference.get((source.name, "train"))

    def start(self) -> DataState:
        """The state before the first batch."""
        return self.at(0)

    def at(self, sample: int, size: int = 0) -> DataState:
        """The state of a run that has used all samples before this one, `size` of them in its last batch."""
        return DataState(
            fingerprint=self.fingerprint,
            seed=self._seed,
            mixture=self._mixture.fingerprint(sample),
            next_sample=sample,
            global_batch=size or self._sizes.first,
        )

    def after(self, used: int, size: int = 0) -> DataState:
        """The state of a run that has used as many samples, without those that are skipped; see `at`."""
        return self.at(int(self._skips.sample(np.array([used - 1]))[0]) + 1 if used else 0, size)

    def count_used(self, state: DataState) -> int:
        """The samples before a state, without those that are skipped."""
        return self._skips.count_unskipped(state.next_sample)

    def check(self, state: DataState) -> None:
        """Raise UserError, naming what changed, unless this data continues the data of the state."""
        current = self.at(state.next_sample)
        fields = ("the training texts or tokenizer (the store)", "data.packing", "data.seq_len", "the objective")
        before, now = ((*fingerprint.split(":"), "causal")[:4] for fingerprint in (state.fingerprint, self.fingerprint))
        for what, old, new in zip(fields, before, now, strict=True):
            if old != new:
                raise UserError(
                    f"{what} changed since the checkpoint: {old} then, {new} now; restore it, or start a new workdir"
                )
        if state.seed != current.seed:
            raise UserError(f"seed changed since the checkpoint: {state.seed} then, {current.seed} now; restore it")
        if state.mixture != current.mixture:
            raise UserError(
                "the mixture of samples already used changed since the checkpoint: restore data.sources.*.weight, "
                "data.mixture_block and data.at_source_end; for new weights add a data.weight_schedule entry from "
                f"sample {state.next_sample} or later"
            )

    def remaining(self, state: DataState) -> int | None:
        """The number of complete batches after `state`; None if the sources repeat without end."""
        if self._mixture.num_samples is None:
            return None
        last, batches = self._skips.count_unskipped(self._mixture.num_samples), 0
        stretches = self._stretches(state)
        for stretch, following in itertools.zip_longest(stretches, stretches[1:]):
            complete = max(0, last - stretch.number) // stretch.size
            batches = stretch.first + complete
            if following is not None and batches < following.first:
                break
        return batches

    def _stretches(self, state: DataState) -> list[Stretch]:
        """The batches from `state` on, in stretches of one size."""
        count_unskipped = self._skips.count_unskipped
        return list(self._sizes.stretches(count_unskipped(state.next_sample), count_unskipped))

    def batches(self, state: DataState, rows_of: Callable[[int], np.ndarray]) -> Iterator[tuple[Batch, DataState]]:
        """Yield batches from `state` on, each with the state after it. Raises UserError at the end of the data.

        rows_of   the rows of a global batch of a size that this process needs, int [local batch]: the Batch has these,
                  in order
        """
        self.check(state)
        rows = {size: np.asarray(rows_of(size), np.int64) for _, size in self._sizes.fields}
        for size, chosen in rows.items():
            if chosen.size and not 0 <= chosen.min() <= chosen.max() < size:
                raise ValueError(f"rows {chosen} are not all in a global batch of {size}")
        stream = self._stream(state, rows)
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Close every open stream, and its thread."""
        for stream in list(self._streams):
            stream.close()

    def _stream(self, state: DataState, rows: dict[int, np.ndarray]) -> Generator[tuple[Batch, DataState], None, None]:
        stretches, length = self._stretches(state), self.remaining(state)

        def assemble(index: int) -> Batch:
            first, size = locate_batch(stretches, index)
            return self._assemble(self._skips.sample(first + rows[size]))

        with contextlib.closing(_prefetch(assemble, length, self._config.prefetch)) as batches:
            for index, batch in enumerate(batches):
                first, size = locate_batch(stretches, index)
                yield batch, self.after(first + size, size)
        raise UserError(
            f"the training data end after {self._mixture.num_samples} samples, {length} batches from sample "
            f"{state.next_sample}: lower train.steps, or set data.at_source_end='repeat'"
        )

    def summary(self, state: DataState | None = None) -> dict[str, dict[str, Any]]:
        """Summaries of the sources by name; with `state` also the samples and epochs of each up to there."""
        report = {source.name: source.summary() for source in self._sources}
        if state is not None:
            for source, count in zip(
                self._sources, self._mixture.count_samples(state.next_sample).tolist(), strict=True
            ):
                report[source.name] |= {"samples": count, "epochs": count / max(1, source.rows)}
        return report

    def _assemble(self, samples: np.ndarray) -> Batch:
        source, row = self._locate(samples)
        parts = [self._sources[index].fill(row[source == index]) for index in np.unique(source).tolist()]
        if len(parts) == 1:
            return self._objective.build_batch(parts[0], samples, self._rng)
        sample_order = np.argsort(np.argsort(source, kind="stable"))  # parts are in the order of sources
        merged = Rows.combine(lambda *values: np.concatenate(values)[sample_order], *parts)
        return self._objective.build_batch(merged, samples, self._rng)

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of its packing) of each sample."""
        source, row = np.empty_like(samples), np.empty_like(samples)
        number = samples // _SPAN
        for span in np.unique(number).tolist():
            chosen = number == span
            sources, rows = self._locate_span(span)
            offset = samples[chosen] - span * _SPAN
            source[chosen], row[chosen] = sources[offset], rows[offset]
        return source, row

    def _locate_span(self, span: int) -> tuple[np.ndarray, np.ndarray]:
        end = (span + 1) * _SPAN
        if self._mixture.num_samples is not None:
            end = min(end, self._mixture.num_samples)
        source, ordinal = self._mixture.locate(np.arange(span * _SPAN, end))
        row = np.empty_like(ordinal)
        for index in np.unique(source).tolist():
            epochs, offset = np.divmod(ordinal, self._sources[index].rows)
            for epoch in np.unique(epochs[source == index]).tolist():
                chosen = (source == index) & (epochs == epoch)
                row[chosen] = self._make_order(index, epoch)(offset[chosen])
        return source, row

    def _make_order(self, index: int, epoch: int) -> Permutation:
        return Permutation(self._sources[index].rows, self._seed, self._sources[index].name, epoch)


class EvalData:
    """Every document of one split of one source exactly once, in batches; the last is padded with rows of weight 0.

    batch      rows in a batch of the whole job
    reference  log-likelihoods of the answers of each row, float32 [rows, 2]; None: the objective reads none
    The objective's draws have their own key, the same in every evaluation of every run.
    """

    def __init__(
        self,
        folder: Path | str,
        config: DataConfig,
        *,
        split: str,
        source: str,
        batch: int,
        objective: Objective,
        reference: np.ndarray | None = None,
    ):
        self._objective, self._rng = objective, CounterRng("evaluation", split, source)
        self._source = PackedSource(Path(folder), source, split, config, self._objective.row_budget)
        self._source.reference = reference
        self._batch, self._prefetch = batch, config.prefetch
        store = self._source.store
        self.fingerprint, self.rows = store.fingerprint, self._source.rows
        self.documents, self.tokens, self.text_bytes = store.documents, store.tokens, store.text_bytes
        self.scored = self._source.scored
        self.num_batches = -(-self.rows // batch)

    def batches(self, rows: np.ndarray) -> Iterator[Batch]:
        """Yield all batches, each with these rows of it (int [local batch], indices into the batch)."""
        rows = np.asarray(rows, np.int64)

        def assemble(index: int) -> Batch:
            samples = index * self._batch + rows
            indices = np.flatnonzero(samples < self.rows)
            packed = self._source.fill(samples[indices])
            if len(indices) < len(rows):
                packed = Rows.combine(lambda value: _pad(value, indices, len(rows)), packed)
            return self._objective.build_batch(packed, samples, self._rng)

        return _prefetch(assemble, self.num_batches, self._prefetch)


class _Batches(grain.sources.RandomAccessDataSource):
    """Batches by index, as a source of Grain."""

    def __init__(self, assemble: Callable[[int], Batch], length: int | None):
        self._assemble, self._length = assemble, sys.maxsize if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index) -> Batch:
        return self._assemble(int(index))


def _prefetch(assemble: Callable[[int], Batch], length: int | None, count: int) -> Generator[Batch, None, None]:
    """Yield the batches in order; one thread assembles `count` of them ahead (0: the caller does)."""
    if length == 0:
        return
    options = grain.ReadOptions(num_threads=min(1, count), prefetch_buffer_size=count)
    iterator = iter(grain.MapDataset.source(_Batches(assemble, length)).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _pad(values: np.ndarray, indices: np.ndarray, size: int) -> np.ndarray:
    """`size` rows: the values at these indices, else 0."""
    out = np.zeros((size, *values.shape[1:]), values.dtype)
    out[indices] = values
    return out
