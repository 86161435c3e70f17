"""Batches for training and evaluation, served by Grain: each batch is a pure function of the data state."""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
import sys
import weakref

import grain
import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.mixture import Mixture
from llmjax.data.batches.order import Permutation, Skips
from llmjax.data.batches.packing import RowBudget, Rows, fill, open_packing
from llmjax.data.batches.rng import CounterRng
from llmjax.data.config import DataConfig
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.token_store import TokenStore
from llmjax.errors import UserError

_STATE_VERSION = 1
_SPAN = 1024  # samples located at once; a cache of spans makes the cost of finding a row vanish


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataState:
    """Where training stands in its data; the same few values on every host.

    version       of this record
    fingerprint   of the training texts, then how they are packed, then the objective unless it is causal:
                  "HASH:best_fit:512:masked rate=0.15"
    seed          of the order
    mixture       hash of all that shaped the mixture up to next_sample
    next_sample   global index of the first sample not yet used; left-out samples count
    global_batch  samples in the last batch
    """

    version: int = _STATE_VERSION
    fingerprint: str
    seed: int
    mixture: str
    next_sample: int
    global_batch: int

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict) -> "DataState":
        if record.get("version") != _STATE_VERSION:
            raise UserError(
                f"data state of version {record.get('version')}: this llmjax reads {_STATE_VERSION}; "
                "resume with the llmjax that wrote the checkpoint"
            )
        return cls(**record)


class PackedSource:
    """One split of one source, packed in rows."""

    def __init__(self, folder: Path, name: str, split: str, config: DataConfig, row_budget: RowBudget | None = None):
        self.name = name
        self.store = TokenStore(Path(folder) / name / split)
        self._row_budget = row_budget or RowBudget(seq_len=config.seq_len)
        self._packing = open_packing(
            self.store, config.seq_len, config.packing, Path(folder) / "plans", self._row_budget
        )
        self.rows = self._packing.rows

    def fill(self, rows: np.ndarray) -> Rows:
        """These rows, in this order."""
        return fill(self.store, self._packing.chunks(rows), len(rows), self._row_budget.capacity)

    def summary(self) -> dict:
        return {
            "documents": self.store.documents,
            "tokens": self.store.tokens,
            "text_bytes": self.store.text_bytes,
            "rows": self.rows,
            "density": self._packing.used / max(1, self.rows * self._row_budget.seq_len),
        }


class TrainData:
    """The training stream of a prepared store: sources mixed, permuted, packed and batched.

    folder        the store
    seed          of the order of samples, and of the objective's draws
    global_batch  samples in a batch of the whole job
    objective     what is made of the rows
    Opening raises UserError for a damaged store, sources without text, and settings that mean nothing.
    """

    def __init__(
        self,
        folder: Path | str,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        objective: Objective,
    ):
        if global_batch < 1:
            raise UserError(f"train.global_batch={global_batch}: a batch has at least one sequence")
        if config.prefetch < 0:
            raise UserError(f"data.prefetch={config.prefetch}: batches assembled ahead, 0 or more")
        if not config.sources:
            raise UserError("data.sources is empty: name at least one, such as data.sources.main.path")
        self._config, self._seed, self._global_batch = config, seed, global_batch
        self._objective, self._draws = objective, CounterRng("objective", seed)
        self._sources = [
            PackedSource(Path(folder), name, "train", config, self._objective.row_budget)
            for name in sorted(config.sources)
        ]
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
        self._spans: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._orders: OrderedDict[tuple[int, int], Permutation] = OrderedDict()
        self._streams: weakref.WeakSet[Generator] = weakref.WeakSet()

    def start(self) -> DataState:
        """The state before the first batch."""
        return self.at(0)

    def at(self, sample: int) -> DataState:
        """The state of a run that has used the samples before this one."""
        return DataState(
            fingerprint=self.fingerprint,
            seed=self._seed,
            mixture=self._mixture.fingerprint(sample),
            next_sample=sample,
            global_batch=self._global_batch,
        )

    def check(self, state: DataState) -> None:
        """Raise UserError naming what changed, where this data would not go on as the state's data did."""
        ours = self.at(state.next_sample)
        fields = ("the training texts or tokenizer (the store)", "data.packing", "data.seq_len", "the objective")
        then, now = ((*fingerprint.split(":"), "causal")[:4] for fingerprint in (state.fingerprint, self.fingerprint))
        for what, old, new in zip(fields, then, now, strict=True):
            if old != new:
                raise UserError(
                    f"{what} changed since the checkpoint: {old} then, {new} now; restore it, or start a new workdir"
                )
        if state.seed != ours.seed:
            raise UserError(f"seed changed since the checkpoint: {state.seed} then, {ours.seed} now; restore it")
        if state.mixture != ours.mixture:
            raise UserError(
                "the mixture of samples already used changed since the checkpoint: restore data.sources.*.weight, "
                "data.mixture_block and data.at_source_end; for new weights add a data.weight_schedule entry from "
                f"sample {state.next_sample} or later"
            )

    def remaining(self, state: DataState) -> int | None:
        """Whole batches that are left; None: the sources repeat without end."""
        if self._mixture.num_samples is None:
            return None
        left = self._skips.kept_before(self._mixture.num_samples) - self._skips.kept_before(state.next_sample)
        return max(0, left) // self._global_batch

    def batches(self, state: DataState, rows: np.ndarray) -> Iterator[tuple[Batch, DataState]]:
        """Batches from `state` on, each with the state after it; asking past the end of the data raises UserError.

        rows  the rows of every global batch that this process needs, int [local batch]: the Batch holds these, in order
        """
        self.check(state)
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self._global_batch:
            raise ValueError(f"rows {rows} are not all in a global batch of {self._global_batch}")
        stream = self._stream(state, rows)
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """End every stream that is still open, and its thread."""
        for stream in list(self._streams):
            stream.close()

    def _stream(self, state: DataState, rows: np.ndarray) -> Generator[tuple[Batch, DataState], None, None]:
        first, size = self._skips.kept_before(state.next_sample), self._global_batch
        length = self.remaining(state)

        def assemble(index: int) -> Batch:
            return self._assemble(self._skips.sample(first + index * size + rows))

        with contextlib.closing(_feed(assemble, length, self._config.prefetch)) as feed:
            for index, batch in enumerate(feed):
                last = self._skips.sample(np.array([first + (index + 1) * size - 1]))
                yield batch, self.at(int(last[0]) + 1)
        raise UserError(
            f"the training data end after {self._mixture.num_samples} samples, {length} batches of {size} from sample "
            f"{state.next_sample}: lower train.steps, or set data.at_source_end='repeat'"
        )

    def summary(self, state: DataState | None = None) -> dict:
        """Per source: documents, tokens, text_bytes, rows, density; and up to `state` its samples and epochs."""
        report = {source.name: source.summary() for source in self._sources}
        if state is not None:
            for source, count in zip(self._sources, self._mixture.counts(state.next_sample).tolist(), strict=True):
                report[source.name] |= {"samples": count, "epochs": count / max(1, source.rows)}
        return report

    def _assemble(self, samples: np.ndarray) -> Batch:
        source, row = self._locate(samples)
        places = [np.flatnonzero(source == index) for index in range(len(self._sources))]
        parts = [(self._sources[i].fill(row[place]), place) for i, place in enumerate(places) if place.size]
        if len(parts) == 1:
            return self._objective.build_batch(parts[0][0], samples, self._draws)
        back = np.argsort(np.concatenate([place for _, place in parts]))
        fields = [field.name for field in dataclasses.fields(Rows)]
        merged = {name: np.concatenate([getattr(part, name) for part, _ in parts])[back] for name in fields}
        return self._objective.build_batch(Rows(**merged), samples, self._draws)

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of its packing) of each sample."""
        source, row = np.empty_like(samples), np.empty_like(samples)
        number = samples // _SPAN
        for span in np.unique(number).tolist():
            chosen = number == span
            sources, rows = _cached(self._spans, span, self._locate_span)
            place = samples[chosen] - span * _SPAN
            source[chosen], row[chosen] = sources[place], rows[place]
        return source, row

    def _locate_span(self, span: int) -> tuple[np.ndarray, np.ndarray]:
        end = (span + 1) * _SPAN
        if self._mixture.num_samples is not None:
            end = min(end, self._mixture.num_samples)
        source, ordinal = self._mixture.locate(np.arange(span * _SPAN, end))
        row = np.empty_like(ordinal)
        for index in np.unique(source).tolist():
            epoch, place = np.divmod(ordinal, self._sources[index].rows)
            for turn in np.unique(epoch[source == index]).tolist():
                chosen = (source == index) & (epoch == turn)
                row[chosen] = _cached(self._orders, (index, turn), self._order)(place[chosen])
        return source, row

    def _order(self, key: tuple[int, int]) -> Permutation:
        index, epoch = key
        return Permutation(self._sources[index].rows, self._seed, self._sources[index].name, epoch)


class EvalData:
    """Every document of one split of one source exactly once, in batches; the last is padded with rows of weight 0.

    `batch` is the rows in a batch of the whole job; the other public fields say how much there is. The objective's
    draws have a key of their own, the same at every evaluation of every run.
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
    ):
        self._objective, self._draws = objective, CounterRng("evaluation", split, source)
        self._source = PackedSource(Path(folder), source, split, config, self._objective.row_budget)
        self._batch, self._prefetch = batch, config.prefetch
        store = self._source.store
        self.fingerprint, self.rows = store.fingerprint, self._source.rows
        self.documents, self.tokens, self.text_bytes = store.documents, store.tokens, store.text_bytes
        self.num_batches = -(-self.rows // batch)

    def batches(self, rows: np.ndarray) -> Iterator[Batch]:
        """All batches, each with these rows of it (int [local batch], indices into the batch)."""
        rows = np.asarray(rows, np.int64)

        def assemble(index: int) -> Batch:
            samples = index * self._batch + rows
            real = np.flatnonzero(samples < self.rows)
            filled = self._source.fill(samples[real])
            if len(real) < len(rows):
                filled = Rows(**{name: _spread(value, real, len(rows)) for name, value in vars(filled).items()})
            return self._objective.build_batch(filled, samples, self._draws)

        return _feed(assemble, self.num_batches, self._prefetch)


class _Batches(grain.sources.RandomAccessDataSource):
    """Whole batches by index, as Grain wants its sources."""

    def __init__(self, assemble: Callable[[int], Batch], length: int | None):
        self._assemble, self._length = assemble, sys.maxsize if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index) -> Batch:
        return self._assemble(int(index))


def _feed(assemble: Callable[[int], Batch], length: int | None, prefetch: int) -> Generator[Batch, None, None]:
    """The batches in order, `prefetch` of them assembled ahead by one thread (0: none, in the caller's)."""
    if length == 0:
        return
    options = grain.ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(_Batches(assemble, length)).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _spread(values: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((size, *values.shape[1:]), values.dtype)
    out[places] = values
    return out


def _cached(cache: OrderedDict, key, make: Callable):
    """make(key), remembered for the few keys asked for last."""
    if key not in cache:
        cache[key] = make(key)
        if len(cache) > 64:
            cache.popitem(last=False)
    return cache[key]
