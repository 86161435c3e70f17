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
from llmjax.curate.engine.measurements import Measured
from llmjax.curate.engine.runners import Runner
from llmjax.curate.filters import quality
from llmjax.data.store import split as splits
from llmjax.errors import UserError

KEPT = -1  # decision "stage" of a document that stays
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
    """Columns of all units, one row a record; `edges` [units + 1] says which rows are whose.

    Scores stay on disk until they are asked for: they are most of the bytes, and are read one by one.
    """

    def __init__(self, units: Sequence[Measured], sources: Sequence[str]):
        """`sources`: of each unit, the input's name."""
        self.units = list(units)
        self.names = list(dict.fromkeys(sources))
        self.reasons: list[str] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _KEPT_COLUMNS}
        self._scored: dict[str, list[int]] = {}  # name of a score -> the units that have it
        for index, unit in enumerate(units):
            with np.load(unit.columns) as stored:
                for name in (name for name in stored.files if name.startswith("score.")):
                    self._scored.setdefault(name.removeprefix("score."), []).append(index)
                for name, parts in columns.items():
                    parts.append(stored[name].astype(_KEPT_COLUMNS[name], copy=False))
                numbers = np.array([self.reason(text) for text in stored["reasons"].tolist()] or [0], np.int32)
                columns["reason"][-1] = numbers[columns["reason"][-1]]
        counts = [len(part) for part in columns["id_hash"]]
        self.edges = np.cumsum([0, *counts])
        self.source = np.repeat([self.names.index(name) for name in sources], counts).astype(np.int32)
        self.columns = {name: np.concatenate(columns.pop(name)) for name in _KEPT_COLUMNS}

    def __len__(self) -> int:
        return int(self.edges[-1])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def reason(self, text: str) -> int:
        """The number of a reason, a new one where it was not known."""
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text)

    def score(self, name: str) -> np.ndarray:
        """float32 [records]; NaN where a record has no such score."""
        column = np.full(len(self), np.nan, np.float32)
        for index in self._scored.get(name, ()):
            with np.load(self.units[index].columns) as stored:
                column[self.edges[index] : self.edges[index + 1]] = stored[f"score.{name}"]
        return column

    def scores(self, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        """(what follows the prefix, column) of the scores whose names begin so, by name, one at a time."""
        for name in sorted(self._scored):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self.score(name)


@dataclasses.dataclass
class Decisions:
    """What becomes of every record.

    stage    int16 [records]: the stage that drops it, by its place in curate.stages, or KEPT
    reason   int32 [records]: index of Table.reasons
    split    uint8 [records]: index of splits.SPLITS, or splits.NONE
    copies   of the duplicates stage; None where there was none
    cluster  uint64 [records]: what the split is a function of
    """

    stage: np.ndarray
    reason: np.ndarray
    split: np.ndarray
    copies: duplicates.Copies | None = None
    cluster: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))

    def drop(self, place: int, which: np.ndarray, reason: int | np.ndarray) -> None:
        """Documents that are still there, and `which` is true of, go at this stage."""
        going = which & (self.stage == KEPT)
        self.stage[going] = place
        self.reason[going] = reason[going] if isinstance(reason, np.ndarray) else reason

    @property
    def kept(self) -> np.ndarray:
        return self.stage == KEPT


def decide(table: Table, config: CurateConfig, runner: Runner, folder: Path, known: "Known") -> Decisions:
    """Stage by stage, in the config's order. `folder` is for what the runner's tasks leave each other."""
    count = len(table)
    made = Decisions(np.full(count, KEPT, np.int16), np.zeros(count, np.int32), np.full(count, splits.NONE, np.uint8))
    content = table["content"][:, 0]
    made.cluster = np.where(content == 0, table["id_hash"], content)
    for place, name in enumerate(config.stages):
        made.drop(place, table["early"] == place, table["reason"])
        if function := _DECIDING.get(name):
            function(table, made, place, config)
        elif name == "duplicates":
            _duplicates(table, made, place, config, runner, folder, known)
        elif name == "sample":
            _sample(table, made, place, config, known)
        elif name == "split":
            made.cluster = known.clusters(content, made.cluster)
            made.split[made.kept] = splits.assign(made.cluster, config.split)[made.kept]
    return made


def _language(table: Table, made: Decisions, place: int, config: CurateConfig) -> None:
    if not config.language.keep:
        return
    code = table["language"]
    wanted = np.isin(code, np.array([str(name).encode() for name in config.language.keep], code.dtype))
    for name in np.unique(code[made.kept & ~wanted]):
        which = (code == name) & ~wanted
        made.drop(place, which, table.reason(f"language {name.decode() or 'und'}"))
    unsure = table.score("confidence") < config.language.min_confidence
    made.drop(place, unsure, table.reason("language uncertain"))


def _quality(table: Table, made: Decisions, place: int, config: CurateConfig) -> None:
    """Where no language was asked, rules for English are asked of all."""
    english = np.isin(table["language"], [b"en", b""])
    for name, broken in quality.broken(table.score, english, config.quality):
        made.drop(place, broken, table.reason(name))


def _duplicates(
    table: Table, made: Decisions, place: int, config: CurateConfig, runner: Runner, folder: Path, known: "Known"
) -> None:
    """Of copies that one stays which stayed before, else the one of the first input, else what a hash of names says.

    What stayed before goes for an exact copy alone: a new document may show two old ones to be alike. Where another
    similarity is asked, all are judged anew.
    """
    content = table["content"]
    old = known.has(content[:, 0])
    stayed = known.stayed(content[:, 0], table["id_hash"])
    order = np.lexsort((content[:, 1], content[:, 0], table["id_hash"], table.source, ~old, ~stayed))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    stays = old & (known.similarity == config.duplicates.similarity)
    copies = duplicates.find(
        content, rank, made.kept, stays, table.units, table.edges, config.duplicates, runner, folder
    )
    gone = copies.kept_as != np.arange(len(table))
    made.drop(place, gone & copies.exact, table.reason("exact duplicate"))
    made.drop(place, gone, table.reason("near duplicate"))
    made.copies = copies
    # A cluster's key is the smallest of its members', whichever of them stays.
    smallest = made.cluster.copy()
    np.minimum.at(smallest, copies.cluster, made.cluster)
    made.cluster = smallest[copies.cluster]


def _decontaminate(table: Table, made: Decisions, place: int, config: CurateConfig) -> None:
    for name, hits in table.scores("contaminated."):
        made.drop(place, hits >= config.decontaminate.min_hits, table.reason(f"in {name}"))


def _personal(table: Table, made: Decisions, place: int, config: CurateConfig) -> None:
    if config.personal_data.action != "drop":
        return
    for kind, count in table.scores("personal."):
        made.drop(place, count > 0, table.reason(f"has {kind}"))


def _sample(table: Table, made: Decisions, place: int, config: CurateConfig, known: "Known") -> None:
    """Caps and weights of inputs, in tokens: of each input its documents in the order of a hash, up to its share.

    Documents that stayed before come first, unless another seed asks for another choice; those that alone are larger
    than the share are passed over.
    """
    tokens = table["sizes"][:, place, 1]
    held = {i: int(tokens[made.kept & (table.source == i)].sum()) for i in range(len(table.names))}
    limits = dict(held)
    for index, name in enumerate(table.names):
        if cap := config.inputs[name].max_tokens:
            limits[index] = min(limits[index], cap)
    given = {i: config.inputs[name].weight for i, name in enumerate(table.names)}
    weights = {i: Fraction(weight) for i, weight in given.items() if weight is not None}  # exact: nothing rounds down
    if weights:
        if lacking := [name for name in table.names if config.inputs[name].weight is None]:
            raise UserError(
                f"curate.inputs.{lacking[0]}.weight is not set, but others are: give all inputs one, or none"
            )
        most = min((limits[i] / w for i, w in weights.items() if w > 0), default=Fraction(0))
        limits = {i: min(limits[i], int(most * w)) for i, w in weights.items()}
    for index, name in enumerate(table.names):
        if limits[index] >= held[index]:
            continue
        chosen = np.flatnonzero(made.kept & (table.source == index))
        fits = chosen[tokens[chosen] <= limits[index]]
        ids = table["id_hash"][fits]
        stayed = known.stayed(table["content"][fits, 0], ids) & (known.seed == config.sample.seed)
        fits = fits[np.lexsort((_stirred(ids, config.sample.seed), ~stayed))]
        beyond = np.zeros(len(table), bool)
        beyond[chosen] = True
        beyond[fits[np.cumsum(tokens[fits], dtype=np.int64) <= limits[index]]] = False
        made.drop(place, beyond, table.reason(f"beyond the share of {name}"))


def _stirred(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Another order for another seed."""
    with np.errstate(over="ignore"):
        values = (hashes ^ np.uint64(seed)) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_DECIDING = {
    "language": _language,
    "quality": _quality,
    "decontaminate": _decontaminate,
    "personal_data": _personal,
}


@dataclasses.dataclass(frozen=True)
class Known:
    """What stayed when the workdir was curated before, and its cluster then: what comes later moves and ousts none.

    contents    uint64 [documents], sorted
    keys        uint64 [documents], of the cluster
    ids         uint64 [documents], hashes of their ids: of exact copies, which one it was
    similarity  of curate.duplicates when they stayed
    seed        of curate.sample when they stayed
    """

    contents: np.ndarray
    keys: np.ndarray
    ids: np.ndarray
    similarity: float
    seed: int

    @classmethod
    def read(cls, path: Path) -> "Known":
        if not path.is_file():
            return cls(*np.zeros((3, 0), np.uint64), similarity=0.0, seed=0)
        with np.load(path) as stored:
            return cls(*stored["documents"], similarity=float(stored["similarity"]), seed=int(stored["seed"]))

    def save(self, path: Path) -> None:
        documents = np.stack([self.contents, self.keys, self.ids])
        with atomic_write(path) as file:
            np.savez(file, documents=documents, similarity=self.similarity, seed=self.seed)  # type: ignore[arg-type]

    def digest(self) -> str:
        """sha256 (hex)"""
        found = hashlib.sha256(repr((self.similarity, self.seed)).encode())
        for array in (self.contents, self.keys, self.ids):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def has(self, content: np.ndarray) -> np.ndarray:
        """bool [documents]: whether one with this content stayed."""
        return np.isin(content, self.contents) & (content != 0)

    def stayed(self, content: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """bool [documents]: whether it is the very one that stayed, by content and id."""
        if not len(self.contents):
            return np.zeros(len(content), bool)
        return self.has(content) & (self.ids[self._place(content)] == ids)

    def _place(self, content: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(self.contents, content), len(self.contents) - 1)

    def clusters(self, content: np.ndarray, cluster: np.ndarray) -> np.ndarray:
        """uint64 [documents]: the key of old documents is the one they had; a new copy of an old one takes that."""
        if not len(self.contents):
            return cluster
        old = self.has(content)
        place = self._place(content)
        unique, inverse = np.unique(cluster, return_inverse=True)
        adopted = np.full(len(unique), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(adopted, inverse[old], self.keys[place[old]])
        has_old = np.zeros(len(unique), bool)
        has_old[inverse[old]] = True
        new = np.where(has_old[inverse], adopted[inverse], cluster)
        return np.where(old, self.keys[place], new)

    def with_new(self, table: Table, made: Decisions, config: CurateConfig) -> "Known":
        """What was known and what stays now: the cluster that was known, the id that stays now."""
        content = table["content"][:, 0]
        here = made.kept & (content != 0)
        contents = np.concatenate([self.contents, content[here]])
        unique, first = np.unique(contents, return_index=True)  # of what was known and came again, the known
        _, last = np.unique(contents[::-1], return_index=True)
        keys = np.concatenate([self.keys, made.cluster[here]])[first]
        ids = np.concatenate([self.ids, table["id_hash"][here]])[::-1][last]
        return Known(unique, keys, ids, config.duplicates.similarity, config.sample.seed)
