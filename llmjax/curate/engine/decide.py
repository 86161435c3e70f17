"""Decide which documents to keep, from the columns of scores; no text is read."""

from collections.abc import Iterator, Sequence
import dataclasses
from fractions import Fraction
import hashlib
from pathlib import Path

import numpy as np

from llmjax.atomic import atomic_write
from llmjax.curate.config import CurateConfig
from llmjax.curate.dedup import duplicates
from llmjax.curate.engine.measurements import Measurement
from llmjax.curate.engine.runners import Exchange
from llmjax.curate.filters import quality
from llmjax.data.hashing import hash64
from llmjax.data.store import split as splits
from llmjax.errors import UserError

KEPT = -1  # Decisions.stage of a kept document
# Columns in memory: 140 bytes per record if all stages run.
_COLUMNS = {
    "id_hash": np.uint64,
    "content_hash": np.uint64,
    "drop_stage": np.int16,
    "reason": np.int32,
    "sizes": np.uint32,
    "language": np.bytes_,
}


class Table:
    """Columns of all units, one row per record; rows offsets[i] to offsets[i + 1] - 1 belong to unit i.

    Scores, which are most of the bytes, stay on disk. Each is read when it is used.
    """

    def __init__(self, measurements: Sequence[Measurement], sources: Sequence[str]):
        """`sources`: the name of each unit's input."""
        self.measurements = list(measurements)
        self.names = list(dict.fromkeys(sources))
        self.reasons: list[str] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        self._units_by_score: dict[str, list[int]] = {}
        for index, measurement in enumerate(measurements):
            with np.load(measurement.columns) as stored:
                for name in stored.files:
                    if name.startswith("score."):
                        self._units_by_score.setdefault(name.removeprefix("score."), []).append(index)
                for name, parts in columns.items():
                    parts.append(stored[name].astype(_COLUMNS[name], copy=False))
                numbers = np.array([self.reason_id(text) for text in stored["reasons"].tolist()] or [0], np.int32)
                columns["reason"][-1] = numbers[columns["reason"][-1]]
        counts = [len(part) for part in columns["id_hash"]]
        self.offsets = np.cumsum([0, *counts])
        self.source = np.repeat([self.names.index(name) for name in sources], counts).astype(np.int32)
        self.columns = {name: np.concatenate(columns.pop(name)) for name in _COLUMNS}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def reason_id(self, text: str) -> int:
        """The index of a reason; a new one is added."""
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text)

    def score(self, name: str) -> np.ndarray:
        """float32 [records]; NaN if a record has no such score."""
        column = np.full(len(self), np.nan, np.float32)
        for index in self._units_by_score.get(name, ()):
            with np.load(self.measurements[index].columns) as stored:
                column[self.offsets[index] : self.offsets[index + 1]] = stored[f"score.{name}"]
        return column

    def scores(self, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        """(name without the prefix, column) of the scores whose names begin with it, sorted by name."""
        for name in sorted(self._units_by_score):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self.score(name)


@dataclasses.dataclass
class Decisions:
    """The decision on every record.

    stage    int16 [records]: index in curate.stages of the stage that drops it, or KEPT
    reason   int32 [records]: index in Table.reasons
    split    uint8 [records]: index in splits.SPLITS, or splits.NONE
    copies   the result of the stage duplicates, if it runs
    cluster  uint64 [records]: hash that decides the split, the same for the copies in a cluster
    """

    stage: np.ndarray
    reason: np.ndarray
    split: np.ndarray
    copies: duplicates.Copies | None = None
    cluster: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))

    def drop(self, stage: int, mask: np.ndarray, reason: int | np.ndarray) -> None:
        """Drop the records of the mask, bool [records], that no earlier stage dropped."""
        is_dropped = mask & self.kept
        self.stage[is_dropped] = stage
        self.reason[is_dropped] = reason[is_dropped] if isinstance(reason, np.ndarray) else reason

    @property
    def kept(self) -> np.ndarray:
        """bool [records]: no stage dropped it."""
        return self.stage == KEPT


def decide(table: Table, config: CurateConfig, exchange: Exchange, history: "History") -> Decisions:
    """Apply the thresholds of the stages, in the config's order."""
    count = len(table)
    decisions = Decisions(
        np.full(count, KEPT, np.int16), np.zeros(count, np.int32), np.full(count, splits.NONE, np.uint8)
    )
    content_hash = table["content_hash"][:, 0]
    decisions.cluster = np.where(content_hash == 0, table["id_hash"], content_hash)
    for stage, name in enumerate(config.stages):
        decisions.drop(stage, table["drop_stage"] == stage, table["reason"])
        if function := _STAGES.get(name):
            function(table, decisions, stage, config)
        elif name == "duplicates":
            _drop_duplicates(table, decisions, stage, config, exchange, history)
        elif name == "sample":
            _balance_inputs(table, decisions, stage, config, history)
        elif name == "split":
            decisions.cluster = history.update_clusters(content_hash, decisions.cluster)
            decisions.split[decisions.kept] = splits.assign_splits(decisions.cluster, config.split)[decisions.kept]
    return decisions


def _filter_languages(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    if not config.language.keep:
        return
    code = table["language"]
    is_listed = np.isin(code, np.array([str(name).encode() for name in config.language.keep], code.dtype))
    for name in np.unique(code[decisions.kept & ~is_listed]):
        decisions.drop(stage, (code == name) & ~is_listed, table.reason_id(f"language {name.decode() or 'und'}"))
    is_uncertain = table.score("confidence") < config.language.min_confidence
    decisions.drop(stage, is_uncertain, table.reason_id("language uncertain"))


def _apply_quality_rules(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    """Without the language stage, rules for English apply to all documents."""
    is_english = np.isin(table["language"], [b"en", b""])
    for name, is_violated in quality.find_violations(table.score, is_english, config.quality):
        decisions.drop(stage, is_violated, table.reason_id(name))


def _drop_duplicates(
    table: Table, decisions: Decisions, stage: int, config: CurateConfig, exchange: Exchange, history: "History"
) -> None:
    """Of copies, keep the one that an earlier run kept, else one of the first input, else the one of the lowest hash.

    A document that an earlier run kept is dropped only as an exact copy, because a new document may connect two old
    ones. If the similarity threshold changed, this protection ends.
    """
    content_hash = table["content_hash"]
    was_kept = history.has_content(content_hash[:, 0])
    is_same = history.has_document(content_hash[:, 0], table["id_hash"])
    order = np.lexsort((content_hash[:, 1], content_hash[:, 0], table["id_hash"], table.source, ~was_kept, ~is_same))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    is_protected = was_kept & (history.similarity == config.duplicates.similarity)
    candidates = duplicates.Candidates(content_hash, rank, decisions.kept, is_protected)
    copies = duplicates.find_copies(candidates, table.measurements, table.offsets, config.duplicates, exchange)
    is_copy = copies.representative != np.arange(len(table))
    decisions.drop(stage, is_copy & copies.is_exact, table.reason_id("exact duplicate"))
    decisions.drop(stage, is_copy, table.reason_id("near duplicate"))
    decisions.copies = copies
    # The hash of a cluster is the smallest of its members', whichever of them is kept.
    smallest = decisions.cluster.copy()
    np.minimum.at(smallest, copies.cluster, decisions.cluster)
    decisions.cluster = smallest[copies.cluster]


def _drop_contaminated(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    for name, num_shared in table.scores("shared_ngrams."):
        is_contaminated = num_shared >= config.decontaminate.min_shared_ngrams
        decisions.drop(stage, is_contaminated, table.reason_id(f"in {name}"))


def _drop_personal_data(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    if config.personal_data.action != "drop":
        return
    for kind, counts in table.scores("personal."):
        decisions.drop(stage, counts > 0, table.reason_id(f"has {kind}"))


def _balance_inputs(table: Table, decisions: Decisions, stage: int, config: CurateConfig, history: "History") -> None:
    """Apply the caps and weights of inputs, in tokens: keep the documents of an input in hash order up to its share.

    Documents that an earlier run with the same seed kept come first. Those larger than the share are dropped.
    """
    tokens = table["sizes"][:, stage, 1]
    totals = {i: int(tokens[decisions.kept & (table.source == i)].sum()) for i in range(len(table.names))}
    limits = dict(totals)
    for index, name in enumerate(table.names):
        if cap := config.inputs[name].max_tokens:
            limits[index] = min(limits[index], cap)
    input_weights = {i: config.inputs[name].weight for i, name in enumerate(table.names)}
    # Fractions are exact: no share is rounded down.
    weights = {i: Fraction(weight) for i, weight in input_weights.items() if weight is not None}
    if weights:
        if unset := [name for name in table.names if config.inputs[name].weight is None]:
            raise UserError(
                f"curate.inputs.{unset[0]}.weight is not set, but other inputs have one; set it for all inputs or none"
            )
        tokens_per_weight = min((limits[i] / w for i, w in weights.items() if w > 0), default=Fraction(0))
        limits = {i: min(limits[i], int(tokens_per_weight * w)) for i, w in weights.items()}
    for index, name in enumerate(table.names):
        if limits[index] >= totals[index]:
            continue
        rows = np.flatnonzero(decisions.kept & (table.source == index))
        small = rows[tokens[rows] <= limits[index]]
        ids = table["id_hash"][small]
        was_kept = history.has_document(table["content_hash"][small, 0], ids) & (history.seed == config.sample.seed)
        small = small[np.lexsort((hash64(ids, np.uint64(config.sample.seed)), ~was_kept))]
        is_beyond = np.zeros(len(table), bool)
        is_beyond[rows] = True
        is_beyond[small[np.cumsum(tokens[small], dtype=np.int64) <= limits[index]]] = False
        decisions.drop(stage, is_beyond, table.reason_id(f"beyond the share of {name}"))


_STAGES = {
    "language": _filter_languages,
    "quality": _apply_quality_rules,
    "decontaminate": _drop_contaminated,
    "personal_data": _drop_personal_data,
}


@dataclasses.dataclass(frozen=True)
class History:
    """The documents that earlier runs in the workdir kept: later documents do not replace them or move their splits.

    content_hashes  uint64 [documents], sorted
    clusters        uint64 [documents]
    id_hashes       uint64 [documents]: they distinguish exact copies
    similarity      curate.duplicates.similarity of the last run
    seed            curate.sample.seed of the last run
    """

    content_hashes: np.ndarray
    clusters: np.ndarray
    id_hashes: np.ndarray
    similarity: float
    seed: int

    @classmethod
    def read(cls, path: Path) -> "History":
        """Read a file that `save` wrote; empty if it does not exist."""
        if not path.is_file():
            return cls(*np.zeros((3, 0), np.uint64), similarity=0.0, seed=0)
        with np.load(path) as stored:
            return cls(*stored["documents"], similarity=float(stored["similarity"]), seed=int(stored["seed"]))

    def save(self, path: Path) -> None:
        """Write an .npz file atomically."""
        documents = np.stack([self.content_hashes, self.clusters, self.id_hashes])
        with atomic_write(path) as file:
            np.savez(file, documents=documents, similarity=np.array(self.similarity), seed=np.array(self.seed))

    def digest(self) -> str:
        """sha256 (hex) of all fields."""
        digest = hashlib.sha256(repr((self.similarity, self.seed)).encode())
        for array in (self.content_hashes, self.clusters, self.id_hashes):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def has_content(self, content_hash: np.ndarray) -> np.ndarray:
        """bool [documents]: whether a document with this content was kept."""
        return np.isin(content_hash, self.content_hashes) & (content_hash != 0)

    def has_document(self, content_hash: np.ndarray, id_hash: np.ndarray) -> np.ndarray:
        """bool [documents]: whether a document with this content and id was kept."""
        if not len(self.content_hashes):
            return np.zeros(len(content_hash), bool)
        return self.has_content(content_hash) & (self.id_hashes[self._index_of(content_hash)] == id_hash)

    def _index_of(self, content_hash: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(self.content_hashes, content_hash), len(self.content_hashes) - 1)

    def update_clusters(self, content_hash: np.ndarray, cluster: np.ndarray) -> np.ndarray:
        """uint64 [documents]: old documents keep their earlier cluster, and new copies of them join it."""
        if not len(self.content_hashes):
            return cluster
        is_old, index = self.has_content(content_hash), self._index_of(content_hash)
        unique, inverse = np.unique(cluster, return_inverse=True)
        earlier = np.full(len(unique), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(earlier, inverse[is_old], self.clusters[index[is_old]])
        has_old = np.zeros(len(unique), bool)
        has_old[inverse[is_old]] = True
        updated = np.where(has_old[inverse], earlier[inverse], cluster)
        return np.where(is_old, self.clusters[index], updated)

    def with_decisions(self, table: Table, decisions: Decisions, config: CurateConfig) -> "History":
        """Add the documents that are kept now. Those kept before keep their cluster and get their new id."""
        content_hash = table["content_hash"][:, 0]
        is_kept = decisions.kept & (content_hash != 0)
        content_hashes = np.concatenate([self.content_hashes, content_hash[is_kept]])
        unique, first = np.unique(content_hashes, return_index=True)
        _, last = np.unique(content_hashes[::-1], return_index=True)
        clusters = np.concatenate([self.clusters, decisions.cluster[is_kept]])[first]
        id_hashes = np.concatenate([self.id_hashes, table["id_hash"][is_kept]])[::-1][last]
        return History(unique, clusters, id_hashes, config.duplicates.similarity, config.sample.seed)
