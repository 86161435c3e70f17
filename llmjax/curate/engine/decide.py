"""Decide which documents to keep, from score columns alone; no text is read."""

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
from llmjax.curate.engine.runners import Runner
from llmjax.curate.filters import quality
from llmjax.data.hashing import hash64
from llmjax.data.store import split as splits
from llmjax.errors import UserError

KEPT = -1  # decision "stage" of a document that is kept
# Columns that are held in memory, 140 bytes a record where all stages run.
_KEPT_COLUMNS = {
    "id_hash": np.uint64,
    "content": np.uint64,
    "early": np.int16,
    "reason": np.int32,
    "sizes": np.uint32,
    "language": np.bytes_,
}


class Table:
    """Columns of all units, one row a record; rows edges[i] up to edges[i + 1] are of unit i.

    Scores are most of the bytes: they stay on disk, and each is read when it is needed.
    """

    def __init__(self, measurements: Sequence[Measurement], sources: Sequence[str]):
        """`sources`: the input's name of each unit."""
        self.measurements = list(measurements)
        self.names = list(dict.fromkeys(sources))
        self.reasons: list[str] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _KEPT_COLUMNS}
        self._scored: dict[str, list[int]] = {}  # name of a score -> the units that have it
        for index, measurement in enumerate(measurements):
            with np.load(measurement.columns) as stored:
                for name in (name for name in stored.files if name.startswith("score.")):
                    self._scored.setdefault(name.removeprefix("score."), []).append(index)
                for name, parts in columns.items():
                    parts.append(stored[name].astype(_KEPT_COLUMNS[name], copy=False))
                numbers = np.array([self.reason_id(text) for text in stored["reasons"].tolist()] or [0], np.int32)
                columns["reason"][-1] = numbers[columns["reason"][-1]]
        counts = [len(part) for part in columns["id_hash"]]
        self.edges = np.cumsum([0, *counts])
        self.source = np.repeat([self.names.index(name) for name in sources], counts).astype(np.int32)
        self.columns = {name: np.concatenate(columns.pop(name)) for name in _KEPT_COLUMNS}

    def __len__(self) -> int:
        return int(self.edges[-1])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def reason_id(self, text: str) -> int:
        """The index of a reason, which is added if it is new."""
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text)

    def score(self, name: str) -> np.ndarray:
        """float32 [records]; NaN if a record has no such score."""
        column = np.full(len(self), np.nan, np.float32)
        for index in self._scored.get(name, ()):
            with np.load(self.measurements[index].columns) as stored:
                column[self.edges[index] : self.edges[index + 1]] = stored[f"score.{name}"]
        return column

    def scores(self, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        """(name after the prefix, column) of the scores whose names begin with it, in order, one at a time."""
        for name in sorted(self._scored):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self.score(name)


@dataclasses.dataclass
class Decisions:
    """What happens to every record.

    stage    int16 [records]: the stage that drops it, as an index of curate.stages, or KEPT
    reason   int32 [records]: index of Table.reasons
    split    uint8 [records]: index of splits.SPLITS, or splits.NONE
    copies   of the duplicates stage, if it runs
    cluster  uint64 [records]: the split is a function of it
    """

    stage: np.ndarray
    reason: np.ndarray
    split: np.ndarray
    copies: duplicates.Copies | None = None
    cluster: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))

    def drop(self, stage: int, mask: np.ndarray, reason: int | np.ndarray) -> None:
        """Drop the documents of the mask, bool [records], that no earlier stage dropped."""
        dropped = mask & (self.stage == KEPT)
        self.stage[dropped] = stage
        self.reason[dropped] = reason[dropped] if isinstance(reason, np.ndarray) else reason

    @property
    def kept(self) -> np.ndarray:
        """bool [records]: no stage dropped it."""
        return self.stage == KEPT


def decide(table: Table, config: CurateConfig, runner: Runner, folder: Path, kept_before: "KeptBefore") -> Decisions:
    """Apply the stages in the config's order. The runner's tasks exchange data in `folder`."""
    count = len(table)
    decisions = Decisions(
        np.full(count, KEPT, np.int16), np.zeros(count, np.int32), np.full(count, splits.NONE, np.uint8)
    )
    content = table["content"][:, 0]
    decisions.cluster = np.where(content == 0, table["id_hash"], content)
    for stage, name in enumerate(config.stages):
        decisions.drop(stage, table["early"] == stage, table["reason"])
        if function := _STAGES.get(name):
            function(table, decisions, stage, config)
        elif name == "duplicates":
            _duplicates(table, decisions, stage, config, runner, folder, kept_before)
        elif name == "sample":
            _sample(table, decisions, stage, config, kept_before)
        elif name == "split":
            decisions.cluster = kept_before.clusters(content, decisions.cluster)
            decisions.split[decisions.kept] = splits.assign_splits(decisions.cluster, config.split)[decisions.kept]
    return decisions


def _language(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    if not config.language.keep:
        return
    code = table["language"]
    is_listed = np.isin(code, np.array([str(name).encode() for name in config.language.keep], code.dtype))
    for name in np.unique(code[decisions.kept & ~is_listed]):
        decisions.drop(stage, (code == name) & ~is_listed, table.reason_id(f"language {name.decode() or 'und'}"))
    unsure = table.score("confidence") < config.language.min_confidence
    decisions.drop(stage, unsure, table.reason_id("language uncertain"))


def _quality(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    """Without the language stage, rules for English apply to all documents."""
    english = np.isin(table["language"], [b"en", b""])
    for name, broken in quality.broken(table.score, english, config.quality):
        decisions.drop(stage, broken, table.reason_id(name))


def _duplicates(
    table: Table,
    decisions: Decisions,
    stage: int,
    config: CurateConfig,
    runner: Runner,
    folder: Path,
    kept_before: "KeptBefore",
) -> None:
    """Of copies, keep the one that an earlier run kept, else the one of the first input, else that of the lowest hash.

    A document that an earlier run kept is dropped only as an exact copy: a new document may connect two old ones.
    With another similarity than before, all documents are judged again.
    """
    content = table["content"]
    old = kept_before.has_content(content[:, 0])
    is_same = kept_before.has_document(content[:, 0], table["id_hash"])
    order = np.lexsort((content[:, 1], content[:, 0], table["id_hash"], table.source, ~old, ~is_same))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    protected = old & (kept_before.similarity == config.duplicates.similarity)
    copies = duplicates.find(
        content, rank, decisions.kept, protected, table.measurements, table.edges, config.duplicates, runner, folder
    )
    is_copy = copies.kept_as != np.arange(len(table))
    decisions.drop(stage, is_copy & copies.exact, table.reason_id("exact duplicate"))
    decisions.drop(stage, is_copy, table.reason_id("near duplicate"))
    decisions.copies = copies
    # A cluster's key is the smallest key of its members, whichever of them is kept.
    smallest = decisions.cluster.copy()
    np.minimum.at(smallest, copies.cluster, decisions.cluster)
    decisions.cluster = smallest[copies.cluster]


def _decontaminate(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    for name, hits in table.scores("contaminated."):
        decisions.drop(stage, hits >= config.decontaminate.min_hits, table.reason_id(f"in {name}"))


def _personal(table: Table, decisions: Decisions, stage: int, config: CurateConfig) -> None:
    if config.personal_data.action != "drop":
        return
    for kind, count in table.scores("personal."):
        decisions.drop(stage, count > 0, table.reason_id(f"has {kind}"))


def _sample(table: Table, decisions: Decisions, stage: int, config: CurateConfig, kept_before: "KeptBefore") -> None:
    """Apply caps and weights of inputs, in tokens: keep the documents of an input in hash order up to its share.

    Documents that an earlier run with the same seed kept come first; those larger than the whole share are skipped.
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
            raise UserError(f"curate.inputs.{unset[0]}.weight is not set, but others are: give all inputs one, or none")
        most = min((limits[i] / w for i, w in weights.items() if w > 0), default=Fraction(0))
        limits = {i: min(limits[i], int(most * w)) for i, w in weights.items()}
    for index, name in enumerate(table.names):
        if limits[index] >= totals[index]:
            continue
        chosen = np.flatnonzero(decisions.kept & (table.source == index))
        fits = chosen[tokens[chosen] <= limits[index]]
        ids = table["id_hash"][fits]
        is_same = kept_before.has_document(table["content"][fits, 0], ids) & (kept_before.seed == config.sample.seed)
        fits = fits[np.lexsort((hash64(ids, np.uint64(config.sample.seed)), ~is_same))]
        beyond = np.zeros(len(table), bool)
        beyond[chosen] = True
        beyond[fits[np.cumsum(tokens[fits], dtype=np.int64) <= limits[index]]] = False
        decisions.drop(stage, beyond, table.reason_id(f"beyond the share of {name}"))


_STAGES = {
    "language": _language,
    "quality": _quality,
    "decontaminate": _decontaminate,
    "personal_data": _personal,
}


@dataclasses.dataclass(frozen=True)
class KeptBefore:
    """What earlier runs in the workdir kept, with its clusters: later documents move and replace none of it.

    contents    uint64 [documents], sorted
    keys        uint64 [documents], of the clusters
    ids         uint64 [documents], hashes of their ids: they tell exact copies apart
    similarity  of curate.duplicates then
    seed        of curate.sample then
    """

    contents: np.ndarray
    keys: np.ndarray
    ids: np.ndarray
    similarity: float
    seed: int

    @classmethod
    def read(cls, path: Path) -> "KeptBefore":
        """Read what `save` wrote; empty if there is no file."""
        if not path.is_file():
            return cls(*np.zeros((3, 0), np.uint64), similarity=0.0, seed=0)
        with np.load(path) as stored:
            return cls(*stored["documents"], similarity=float(stored["similarity"]), seed=int(stored["seed"]))

    def save(self, path: Path) -> None:
        """Write an .npz file atomically."""
        documents = np.stack([self.contents, self.keys, self.ids])
        with atomic_write(path) as file:
            np.savez(file, documents=documents, similarity=np.array(self.similarity), seed=np.array(self.seed))

    def digest(self) -> str:
        """sha256 (hex) of all fields."""
        found = hashlib.sha256(repr((self.similarity, self.seed)).encode())
        for array in (self.contents, self.keys, self.ids):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def has_content(self, content: np.ndarray) -> np.ndarray:
        """bool [documents]: whether a document with this content was kept."""
        return np.isin(content, self.contents) & (content != 0)

    def has_document(self, content: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """bool [documents]: whether a document with this content and id was kept."""
        if not len(self.contents):
            return np.zeros(len(content), bool)
        return self.has_content(content) & (self.ids[self._index_of(content)] == ids)

    def _index_of(self, content: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(self.contents, content), len(self.contents) - 1)

    def clusters(self, content: np.ndarray, cluster: np.ndarray) -> np.ndarray:
        """uint64 [documents]: keys of clusters; old documents keep their key, and new copies of them get it."""
        if not len(self.contents):
            return cluster
        old = self.has_content(content)
        index = self._index_of(content)
        unique, inverse = np.unique(cluster, return_inverse=True)
        adopted = np.full(len(unique), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(adopted, inverse[old], self.keys[index[old]])
        has_old = np.zeros(len(unique), bool)
        has_old[inverse[old]] = True
        new = np.where(has_old[inverse], adopted[inverse], cluster)
        return np.where(old, self.keys[index], new)

    def with_decisions(self, table: Table, decisions: Decisions, config: CurateConfig) -> "KeptBefore":
        """Add what is kept now. Documents that are kept again keep their old cluster and get their new id."""
        content = table["content"][:, 0]
        new = decisions.kept & (content != 0)
        contents = np.concatenate([self.contents, content[new]])
        unique, first = np.unique(contents, return_index=True)
        _, last = np.unique(contents[::-1], return_index=True)
        keys = np.concatenate([self.keys, decisions.cluster[new]])[first]
        ids = np.concatenate([self.ids, table["id_hash"][new]])[::-1][last]
        return KeptBefore(unique, keys, ids, config.duplicates.similarity, config.sample.seed)
