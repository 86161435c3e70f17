"""Pack documents into rows of fixed length: best-fit decreasing, planned once, or windows over the stream.

Either way every token of the store is a target exactly once, and documents stay apart by their segment numbers.
"""

from collections import defaultdict
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Protocol

import numpy as np

from llmjax.atomic import write_bytes
from llmjax.data.store.token_store import TokenStore
from llmjax.errors import UserError

ALGORITHMS = ("best_fit", "concat")
_VERSION = 1
_PART_TOKENS = 1 << 32  # planned at once, to bound memory; a larger store is planned by groups of whole shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Pieces of documents in the order in which rows hold them; every field has one entry a chunk.

    row        int64, the place in the list of rows asked for
    start      int64, offset of the first token in the store's flat stream
    length     int64, tokens
    continued  bool, the piece begins inside its document
    """

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    continued: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed rows before an objective has made a batch of them: int32 [rows, seq_len] each, 0 where padded.

    tokens     the documents' tokens
    before     the token before each in its document, or BOS (EOS where there is none) at its start
    segments   1, 2, ... number the chunks of a row
    positions  counted from 0 in each segment
    """

    targets: np.ndarray
    inputs: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBudget:
    """How much of a row an objective needs for a chunk.

    seq_len  the room of a row
    costs    int64 [longest chunk + 1], what a chunk of each length takes, each at most seq_len; None: its tokens
    name     of the costs, so that plans are told apart; "" where there are none
    """

    seq_len: int
    costs: np.ndarray | None = None
    name: str = ""

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk that a row can take."""
        return self.seq_len if self.costs is None else len(self.costs) - 1

    @property
    def capacity(self) -> int:
        """Tokens of text that a row takes at most."""
        if self.costs is None:
            return self.seq_len
        return int((self.seq_len * np.arange(1, len(self.costs)) // self.costs[1:]).max())

    def cost(self, lengths: np.ndarray) -> np.ndarray:
        """The room that chunks of these lengths take."""
        return lengths if self.costs is None else self.costs[lengths]


class Packing(Protocol):
    """Which chunks stand in which row. `rows` counts them, `used` the room that their chunks take."""

    rows: int
    used: int

    def chunks(self, rows: np.ndarray) -> Chunks:
        """The chunks of these rows, row by row."""
        ...


def open_packing(
    store: TokenStore, seq_len: int, algorithm: str, plans: Path, row_budget: RowBudget | None = None
) -> Packing:
    """The packing of a store; a best-fit plan is computed at first use and kept in the folder `plans`.

    room  what chunks take of a row; None: their tokens
    """
    if seq_len < 1:
        raise UserError(f"data.seq_len={seq_len}: a row has at least one token")
    row_budget = row_budget or RowBudget(seq_len=seq_len)
    if algorithm == "concat":
        if row_budget.costs is not None:
            raise UserError(
                f"data.packing='concat': windows of {seq_len} tokens leave no room for what objective.name="
                f"{row_budget.name.split()[0]!r} makes of them; set data.packing='best_fit'"
            )
        return Windows(store, seq_len)
    if algorithm == "best_fit":
        return BestFitPlan(store, row_budget, plans)
    raise UserError(f"data.packing={algorithm!r}: known are {', '.join(ALGORITHMS)}")


class Windows:
    """Row r holds the tokens [r * seq_len, (r + 1) * seq_len) of the flat stream; only the last can be short."""

    def __init__(self, store: TokenStore, seq_len: int):
        self._store, self._seq_len = store, seq_len
        self.rows, self.used = -(-store.tokens // seq_len), store.tokens

    def chunks(self, rows: np.ndarray) -> Chunks:
        starts, continued, counts, ends = [], [], [], []
        for row in rows.tolist():
            a, b = row * self._seq_len, min((row + 1) * self._seq_len, self._store.tokens)
            heads = self._store.starts_between(a, b)
            inside = not heads.size or heads[0] > a
            starts += [[a] if inside else [], heads]
            continued += [[inside] if inside else [], np.zeros(heads.size, bool)]
            counts.append(heads.size + inside)
            ends.append(b)
        start = np.concatenate([np.zeros(0, np.int64), *starts]).astype(np.int64)
        last = np.cumsum(counts, dtype=np.int64) - 1
        end = np.append(start[1:], 0)
        end[last] = ends
        return Chunks(
            row=np.repeat(np.arange(len(counts)), counts),
            start=start,
            length=end - start,
            continued=np.concatenate([np.zeros(0, bool), *continued]).astype(bool),
        )


class BestFitPlan:
    """A plan from lengths alone, memory-mapped: the same bytes whoever makes it, so several processes may."""

    def __init__(self, store: TokenStore, row_budget: RowBudget, plans: Path):
        made_of = (
            f"{store.fingerprint}/{row_budget.seq_len}/best_fit/{_VERSION}{row_budget.name and '/' + row_budget.name}"
        )
        key = hashlib.sha256(made_of.encode()).hexdigest()[:24]
        folder = Path(plans) / f"best_fit-{row_budget.seq_len}-{key}"
        if not folder.is_dir():
            _write_plan(store, row_budget, folder)
        try:
            sizes = json.loads((folder / "plan.json").read_text())
            self._starts = _map(folder / "starts.bin", "<i8", sizes["chunks"])
            self._lengths = _map(folder / "lengths.bin", "<i4", sizes["chunks"])
            self._continued = _map(folder / "continued.bin", "|b1", sizes["chunks"])
            self._edges = _map(folder / "rows.bin", "<i8", sizes["rows"] + 1)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"packing plan {folder} is damaged ({error}); delete that folder, it is made again"
            ) from None
        self.rows: int = sizes["rows"]
        self.used: int = sizes.get("room", store.tokens)

    def chunks(self, rows: np.ndarray) -> Chunks:
        first = self._edges[rows]
        counts = self._edges[rows + 1] - first
        index = ranges(first, counts)
        return Chunks(
            row=np.repeat(np.arange(len(rows)), counts),
            start=self._starts[index],
            length=self._lengths[index].astype(np.int64),
            continued=self._continued[index],
        )


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the row of each chunk (int64) and the number of rows. Lengths, or costs: 1 to seq_len.

    Longest first, each chunk goes to the row with the least room that still takes it. Rows with equal room are alike
    and so are chunks of equal length, so whole groups move at once: the work grows with seq_len, not with the chunks.
    """
    order = np.argsort((seq_len - lengths).astype(np.min_scalar_type(seq_len)), kind="stable")
    counts = np.bincount(lengths, minlength=seq_len + 1)
    free_space: dict[int, list[tuple[int, int]]] = defaultdict(list)  # room left -> groups of rows (first, number)
    rooms = np.zeros(seq_len + 1, bool)
    moves = []  # (first row, rows, chunks a row); chunks follow in the order of `order`
    num_rows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            space = length + int(np.argmax(rooms[length:]))
            if rooms[space]:
                first, number = free_space[space].pop()
            else:
                space, first, number = seq_len, num_rows, -(-left // (seq_len // length))
                num_rows += number
            each = min(space // length, left)
            taken = min(number, left // each)
            if taken < number:
                free_space[space].append((first + taken, number - taken))
            rooms[space] = bool(free_space[space])
            free_space[space - each * length].append((first, taken))
            rooms[space - each * length] = True
            moves.append((first, taken, each))
            left -= taken * each
    firsts, takens, each = np.array(moves, np.int64).reshape(-1, 3).T
    rows = np.empty(lengths.size, np.int64)
    rows[order] = np.repeat(ranges(firsts, takens), np.repeat(each, takens))
    return rows, num_rows


def cut(starts: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents to chunks of at most `longest` tokens, in order: (start, length, continued) of each."""
    pieces = -(-lengths // longest)
    number = ranges(np.zeros_like(pieces), pieces)
    start = np.repeat(starts, pieces) + number * longest
    length = np.minimum(longest, np.repeat(starts + lengths, pieces) - start)
    return start, length, number > 0


def fill(store: TokenStore, chunks: Chunks, num_rows: int, seq_len: int) -> Rows:
    """Read the chunks and lay them out, row by row, in rows of seq_len places (an objective's RowBudget.capacity)."""
    tokens = store.gather(chunks.start, chunks.length)
    before = np.empty_like(tokens)
    before[1:] = tokens[:-1]
    heads = np.cumsum(chunks.length) - chunks.length
    before[heads] = store.eos_id if store.bos_id is None else store.bos_id
    if chunks.continued.any():
        inside = chunks.start[chunks.continued]
        before[heads[chunks.continued]] = store.gather(inside - 1, np.ones_like(inside))
    counts = np.bincount(chunks.row, minlength=num_rows)
    number = 1 + ranges(np.zeros_like(counts), counts)
    positions = np.arange(tokens.size, dtype=np.int32) - np.repeat(heads.astype(np.int32), chunks.length)
    segments = np.repeat(number.astype(np.int32), chunks.length)
    used = np.bincount(chunks.row, weights=chunks.length, minlength=num_rows).astype(np.int64)
    flat = (tokens, before, segments, positions)
    if tokens.size == num_rows * seq_len:
        laid = [values.reshape(num_rows, seq_len) for values in flat]
    else:
        laid = [np.zeros((num_rows, seq_len), np.int32) for _ in flat]
        for row, (end, length) in enumerate(zip(np.cumsum(used).tolist(), used.tolist(), strict=True)):
            for out, values in zip(laid, flat, strict=True):
                out[row, :length] = values[end - length : end]
    return Rows(targets=laid[0], inputs=laid[1], segments=laid[2], positions=laid[3])


def _write_plan(store: TokenStore, row_budget: RowBudget, folder: Path) -> None:
    """Plan and write to a folder of our own, then rename it: whoever comes first wins, with the same bytes."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        num_chunks = num_rows = used = 0
        names = ("starts", "lengths", "continued", "rows")
        files = {name: open(partial / f"{name}.bin", "wb") for name in names}  # noqa: SIM115
        files["rows"].write(np.zeros(1, "<i8").tobytes())
        for starts, lengths in store.document_groups(_PART_TOKENS):
            start, length, continued = cut(starts, lengths, row_budget.longest)
            costs = row_budget.cost(length)
            row, rows = best_fit(costs, row_budget.seq_len)
            order = np.argsort(row, kind="stable")
            files["starts"].write(start[order].astype("<i8").tobytes())
            files["lengths"].write(length[order].astype("<i4").tobytes())
            files["continued"].write(continued[order].tobytes())
            ends = num_chunks + np.cumsum(np.bincount(row, minlength=rows))
            files["rows"].write(ends.astype("<i8").tobytes())
            num_chunks, num_rows, used = num_chunks + len(row), num_rows + rows, used + int(costs.sum())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        sizes = {"chunks": num_chunks, "rows": num_rows} | ({} if row_budget.costs is None else {"room": used})
        write_bytes(partial / "plan.json", json.dumps(sizes).encode())
    except OSError as error:
        raise UserError(
            f"packing plan {folder} cannot be written ({error}); make it writable, or set data.packing='concat'"
        ) from None
    try:
        os.rename(partial, folder)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    # A plain view of the mapping: np.memmap's own slicing is several times slower.
    return np.asarray(np.memmap(path, dtype, "r", shape=(size,))) if size else np.zeros(0, dtype)


def ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first, first + 1, ... (count of them) for each, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(firsts - (ends - counts), counts)
