"""Pack documents into rows of fixed length: by a plan that is computed once, or windows over the stream.

Either way every token of the store is a target exactly once, but for dialogues, which are cut where they do not fit.
Segment numbers keep documents apart, but for "stream".
"""

from collections import defaultdict
from collections.abc import Callable
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

import numpy as np

from llmjax.atomic import write_bytes
from llmjax.data.batches.dialogues import DialogueCounts, cut_dialogues
from llmjax.data.store.checked_file import CheckedFile, block_checksums
from llmjax.data.store.token_store import TokenStore
from llmjax.errors import UserError

ALGORITHMS = ("best_fit", "concat", "stream", "none")
ONE_SEGMENT = ("stream", "none")  # no row has a second segment, whatever the documents are
_PLANNED = ("best_fit", "none")
_VERSION = 2
_PART_TOKENS = 1 << 32  # planned at once, to bound memory; a larger store is planned by groups of whole shards
_MAX_BYTES_IN_MEMORY = 1 << 28  # a larger array of a plan stays on disk
_EDGE = np.dtype("<i8")
_CHUNK = np.dtype([("start", "<i8"), ("length", "<i4"), ("continued", "|b1")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Spans of documents in the order in which rows hold them; every field has one entry a chunk.

    row        int64, index into the list of requested rows
    start      int64, offset of the first token in the store's flat stream
    length     int64, tokens
    continued  bool, the chunk begins inside its document
    """

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    continued: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed rows before an objective turns them into a batch: int32 [rows, seq_len] each, 0 (False) where padded.

    targets    the documents' tokens
    inputs     the token before each target in its document, or BOS (EOS if there is none) at its start
    segments   1, 2, ... number the chunks of a row
    positions  counted from 0 in each segment
    scored     bool, whether the target is: all text is, but of dialogues only what the assistant writes
    labels     float32 [rows, seq_len, width], those of a document at its first position; None: there are none
    reference  float32 [rows, 2], of preferences, see Batch; None: there is none
    """

    targets: np.ndarray
    inputs: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    scored: np.ndarray
    labels: np.ndarray | None = None
    reference: np.ndarray | None = None

    @staticmethod
    def combine(function: Callable[..., np.ndarray], *parts: "Rows") -> "Rows":
        """Rows whose fields are `function` of the same field of all parts; a field that is None stays None."""
        fields = zip(*(vars(part).items() for part in parts), strict=True)
        values: dict[str, Any] = {items[0][0]: [value for _, value in items] for items in fields}
        combined: dict[str, Any] = {
            name: None if value[0] is None else function(*value) for name, value in values.items()
        }
        return Rows(**combined)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBudget:
    """How much of a row an objective needs for a chunk.

    seq_len  positions in a row
    costs    int64 [longest chunk + 1], the positions that a chunk of each length needs, each at most seq_len; None:
             its tokens
    name     of the costs, which distinguishes plans with different costs; "" if there are none
    """

    seq_len: int
    costs: np.ndarray | None = None
    name: str = ""

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk that fits a row."""
        return self.seq_len if self.costs is None else len(self.costs) - 1

    @property
    def capacity(self) -> int:
        """The most tokens of text that fit a row."""
        if self.costs is None:
            return self.seq_len
        return int((self.seq_len * np.arange(1, len(self.costs)) // self.costs[1:]).max())

    def cost(self, lengths: np.ndarray) -> np.ndarray:
        """The positions that chunks of these lengths need."""
        return lengths if self.costs is None else self.costs[lengths]


def open_packing(
    store: TokenStore, seq_len: int, algorithm: str, plans: Path, row_budget: RowBudget | None = None
) -> "Windows | PackingPlan":
    """Open the packing of a store; a plan is computed at first use and kept in the folder `plans`.

    row_budget  what chunks need of a row; None: their tokens
    """
    if seq_len < 1:
        raise UserError(f"data.seq_len={seq_len}: a row has at least one token; set it to 1 or more")
    row_budget = row_budget or RowBudget(seq_len=seq_len)
    if algorithm not in ALGORITHMS:
        raise UserError(f"data.packing={algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    if algorithm in _PLANNED:
        return PackingPlan(store, row_budget, algorithm, plans)
    if store.has_marks:
        raise UserError(
            f"data.packing={algorithm!r}: {store.folder} holds dialogues, which windows would cut anywhere; set it to "
            f"{' or '.join(map(repr, _PLANNED))}"
        )
    if row_budget.costs is not None:
        raise UserError(
            f"data.packing={algorithm!r}: objective.name={row_budget.name.split()[0]!r} adds tokens to the text, which "
            f"do not fit beside windows of {seq_len} tokens; set data.packing='best_fit'"
        )
    return Windows(store, seq_len)


class Windows:
    """Row r holds the tokens [r * seq_len, (r + 1) * seq_len) of the flat stream; only the last can be short.

    rows  their number
    used  the positions that their chunks need
    scored  the targets that are scored: all
    """

    def __init__(self, store: TokenStore, seq_len: int):
        self._store, self._seq_len = store, seq_len
        self.rows, self.used, self.scored = -(-store.tokens // seq_len), store.tokens, store.tokens

    def chunks(self, rows: np.ndarray) -> Chunks:
        """The chunks of these rows, row by row."""
        starts, continued, counts, ends = [], [], [], []
        for row in rows.tolist():
            a, b = row * self._seq_len, min((row + 1) * self._seq_len, self._store.tokens)
            document_starts = self._store.starts_between(a, b)
            inside = not document_starts.size or document_starts[0] > a
            starts += [[a] if inside else [], document_starts]
            continued += [[inside] if inside else [], np.zeros(document_starts.size, bool)]
            counts.append(document_starts.size + inside)
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


class PackingPlan:
    """A plan of rows on disk. Every process that makes it writes the same bytes, so several may do so at once.

    chunks.bin holds the chunks in row order (_CHUNK), rows.bin the index of the first chunk of each row, and the end.
    scored        the targets that are scored
    cut           dialogues that were cut at the end of a turn
    left_out      dialogues of which no assistant turn fits a row
    """

    def __init__(self, store: TokenStore, row_budget: RowBudget, algorithm: str, plans: Path):
        identity = f"{store.fingerprint}/{row_budget.seq_len}/{algorithm}/{_VERSION}"
        if row_budget.name:
            identity += f"/{row_budget.name}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:24]
        folder = Path(plans) / f"{algorithm}-{row_budget.seq_len}-{key}"
        if not folder.is_dir():
            _write_plan(store, row_budget, algorithm, folder)
        hint = f"delete {folder}; the plan is then computed again"
        try:
            record = json.loads((folder / "plan.json").read_text())
            self.rows: int = record["rows"]
            self.used: int = record["used"]
            self.scored: int = record.get("scored", store.tokens)
            self.cut: int = record.get("cut", 0)
            self.left_out: int = record.get("left_out", 0)
            num_chunks, checksums = record["chunks"], dict(record["block_crc32"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"packing plan {folder / 'plan.json'} is damaged ({error}); {hint}") from None
        self._chunks = _PlanArray(folder / "chunks.bin", _CHUNK, num_chunks, checksums, hint)
        self._edges = _PlanArray(folder / "rows.bin", _EDGE, self.rows + 1, checksums, hint)

    def chunks(self, rows: np.ndarray) -> Chunks:
        """The chunks of these rows, row by row."""
        edges = self._edges.read(rows, np.full(len(rows), 2)).reshape(-1, 2)
        counts = edges[:, 1] - edges[:, 0]
        chunks = self._chunks.read(edges[:, 0], counts)
        return Chunks(
            row=np.repeat(np.arange(len(rows)), counts),
            start=chunks["start"].astype(np.int64),
            length=chunks["length"].astype(np.int64),
            continued=chunks["continued"].copy(),
        )


class _PlanArray:
    """A 1-D array on disk: held in memory if it is small, else read as needed.

    It is never memory-mapped, since touching a mapping of a truncated file kills the process.
    """

    def __init__(self, path: Path, dtype: np.dtype, size: int, checksums: dict[str, str], hint: str):
        self._dtype, nbytes = dtype, size * dtype.itemsize
        self._file = CheckedFile(path, name="packing plan", size=nbytes, block_crc32=checksums[path.name], hint=hint)
        in_memory = nbytes <= _MAX_BYTES_IN_MEMORY
        data = self._file.read(0, nbytes if in_memory else dtype.itemsize)  # any read compares the size
        self._values = np.frombuffer(data, dtype) if in_memory else None

    def read(self, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Values [first, first + count) of each pair, one after the other."""
        if self._values is not None:
            return self._values[ranges(firsts, counts)]
        item = self._dtype.itemsize
        spans = zip((firsts * item).tolist(), ((firsts + counts) * item).tolist(), strict=True)
        return np.frombuffer(b"".join([self._file.read(start, end) for start, end in spans]), self._dtype)


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the row of each chunk (int64) and the number of rows. Lengths, or costs: 1 to seq_len.

    Longest first, each chunk goes to the fullest row that it still fits. Rows with equal free space are alike and so
    are chunks of equal length, so whole groups move at once: the work grows with seq_len, not with the chunks.
    """
    order = np.argsort((seq_len - lengths).astype(np.min_scalar_type(seq_len)), kind="stable")
    counts = np.bincount(lengths, minlength=seq_len + 1)
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)  # free space -> groups of rows (first, number)
    has_group = np.zeros(seq_len + 1, bool)
    moves = []  # (first row, rows, chunks a row); chunks follow in the order of `order`
    num_rows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[length])
        while remaining:
            space = length + int(np.argmax(has_group[length:]))
            if has_group[space]:
                first, number = groups[space].pop()
            else:
                space, first, number = seq_len, num_rows, -(-remaining // (seq_len // length))
                num_rows += number
            each = min(space // length, remaining)
            filled = min(number, remaining // each)
            if filled < number:
                groups[space].append((first + filled, number - filled))
            has_group[space] = bool(groups[space])
            groups[space - each * length].append((first, filled))
            has_group[space - each * length] = True
            moves.append((first, filled, each))
            remaining -= filled * each
    firsts, numbers, each = np.array(moves, np.int64).reshape(-1, 3).T
    rows = np.empty(lengths.size, np.int64)
    rows[order] = np.repeat(ranges(firsts, numbers), np.repeat(each, numbers))
    return rows, num_rows


def cut_documents(starts: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into chunks of at most `longest` tokens, in order: (start, length, continued) of each."""
    counts = -(-lengths // longest)
    number = ranges(np.zeros_like(counts), counts)
    start = np.repeat(starts, counts) + number * longest
    length = np.minimum(longest, np.repeat(starts + lengths, counts) - start)
    return start, length, number > 0


def fill_rows(store: TokenStore, chunks: Chunks, num_rows: int, seq_len: int) -> Rows:
    """Read the chunks into rows of seq_len positions (an objective's RowBudget.capacity)."""
    targets, marks = store.gather_scored(chunks.start, chunks.length)
    scored = np.ones(targets.size, bool) if marks is None else marks
    inputs = np.empty_like(targets)
    inputs[1:] = targets[:-1]
    heads = np.cumsum(chunks.length) - chunks.length
    inputs[heads] = store.eos_id if store.bos_id is None else store.bos_id
    if chunks.continued.any():
        inside = chunks.start[chunks.continued]
        inputs[heads[chunks.continued]] = store.gather(inside - 1, np.ones_like(inside))
    counts = np.bincount(chunks.row, minlength=num_rows)
    number = 1 + ranges(np.zeros_like(counts), counts)
    positions = np.arange(targets.size, dtype=np.int32) - np.repeat(heads.astype(np.int32), chunks.length)
    segments = np.repeat(number.astype(np.int32), chunks.length)
    used = np.bincount(chunks.row, weights=chunks.length, minlength=num_rows).astype(np.int64)
    flat = (targets, inputs, segments, positions, scored)
    if targets.size == num_rows * seq_len:
        padded = [values.reshape(num_rows, seq_len) for values in flat]
    else:
        padded = [np.zeros((num_rows, seq_len), values.dtype) for values in flat]
        for row, (end, length) in enumerate(zip(np.cumsum(used).tolist(), used.tolist(), strict=True)):
            for out, values in zip(padded, flat, strict=True):
                out[row, :length] = values[end - length : end]
    labels = None
    if store.label_width:
        labels = np.zeros((num_rows, seq_len, store.label_width), np.float32)
        columns = heads - (np.cumsum(used) - used)[chunks.row]
        labels[chunks.row, columns] = store.gather_labels(chunks.start)
    targets, inputs, segments, positions, scored = padded
    return Rows(targets=targets, inputs=inputs, segments=segments, positions=positions, scored=scored, labels=labels)


def join_segments(rows: Rows) -> Rows:
    """The rows with all their text as one segment, so that a document sees those before it in the row."""
    is_text = (rows.segments > 0).astype(np.int32)
    places = np.arange(is_text.shape[1], dtype=np.int32)
    return dataclasses.replace(rows, segments=is_text, positions=places * is_text)


def _write_plan(store: TokenStore, row_budget: RowBudget, algorithm: str, folder: Path) -> None:
    """Write the plan to a folder of this process, then rename it: the first process to finish wins."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        num_chunks = num_rows = used = 0
        with open(partial / "chunks.bin", "w+b") as chunks_file, open(partial / "rows.bin", "w+b") as rows_file:
            rows_file.write(np.zeros(1, _EDGE).tobytes())
            dialogues = DialogueCounts()
            for starts, lengths in store.document_groups(_PART_TOKENS):
                if store.has_marks:
                    start, length, counts = cut_dialogues(store, starts, lengths, row_budget.longest)
                    continued, dialogues = np.ones(len(start), bool), dialogues + counts
                else:
                    start, length, continued = cut_documents(starts, lengths, row_budget.longest)
                costs = row_budget.cost(length)
                is_packed = algorithm == "best_fit"
                row, rows = best_fit(costs, row_budget.seq_len) if is_packed else (np.arange(len(costs)), len(costs))
                chunks = np.empty(len(row), _CHUNK)
                chunks["start"], chunks["length"], chunks["continued"] = start, length, continued
                chunks_file.write(chunks[np.argsort(row, kind="stable")].tobytes())
                ends = num_chunks + np.cumsum(np.bincount(row, minlength=rows))
                rows_file.write(ends.astype(_EDGE).tobytes())
                num_chunks, num_rows, used = num_chunks + len(row), num_rows + rows, used + int(costs.sum())
            checksums = {Path(file.name).name: block_checksums(file) for file in (chunks_file, rows_file)}
            for file in (chunks_file, rows_file):
                file.flush()
                os.fsync(file.fileno())
        record = {"chunks": num_chunks, "rows": num_rows, "used": used, "block_crc32": checksums}
        if store.has_marks:
            scored = store.scored_tokens - dialogues.dropped
            record |= {"scored": scored, "cut": dialogues.cut, "left_out": dialogues.left_out}
        write_bytes(partial / "plan.json", json.dumps(record).encode())
    except OSError as error:
        raise UserError(
            f"packing plan {folder} cannot be written ({error}); make it writable, or set data.packing='concat'"
        ) from None
    try:
        os.rename(partial, folder)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)


def ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The integers first, first + 1, ... (`count` of them) of each pair, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(firsts - (ends - counts), counts)
