"""Packing: every token is a target exactly once, documents stay apart, rows are full, the plan is repeatable."""

import gzip
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from llmjax.data.batches import packing
from llmjax.data.batches.packing import ALGORITHMS, best_fit, cut_documents, fill_rows, open_packing
from llmjax.data.store.token_store import TokenStore
from llmjax.errors import UserError
from tests.data.stores import BOS, EOS, random_documents, write_store

SEQ_LEN = 16


def all_rows(store, tmp_path, algorithm, seq_len=SEQ_LEN):
    plan = open_packing(store, seq_len, algorithm, tmp_path / "plans")
    return fill_rows(store, plan.chunks(np.arange(plan.rows)), plan.rows, seq_len)


def unpack(rows):
    """The segments of packed rows as (tokens, tokens before), checking their layout on the way."""
    pieces = []
    for tokens, before, segments, positions in zip(
        rows.targets, rows.inputs, rows.segments, rows.positions, strict=True
    ):
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all() and (np.diff(segments[:used]) >= 0).all()
        for segment in range(1, int(segments.max(initial=0)) + 1):
            (columns,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(positions[columns], np.arange(columns.size))
            pieces.append((tokens[columns], before[columns]))
        for padded in (tokens, before, positions):
            assert (padded[used:] == 0).all()
    return pieces


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bos_id", [BOS, None])
@pytest.mark.parametrize("shards", [1, 3])
def test_documents_round_trip_exactly(tmp_path, algorithm, bos_id, shards):
    documents = random_documents(0, 120, 3 * SEQ_LEN)
    store = write_store(tmp_path / "s", documents, shards=shards, bos_id=bos_id)
    pieces = unpack(all_rows(store, tmp_path, algorithm))
    starts = [i for i, (_, before) in enumerate(pieces) if before[0] == (EOS if bos_id is None else bos_id)]
    assert sum(len(tokens) for tokens, _ in pieces) == store.tokens
    for tokens, before in pieces:
        np.testing.assert_array_equal(before[1:], tokens[:-1])
    if algorithm in ("concat", "stream"):  # rows follow the stream
        flat = np.concatenate([tokens for tokens, _ in pieces])
        np.testing.assert_array_equal(flat, np.concatenate(documents))
        assert len(starts) == len(documents)
    else:
        expected = sorted(
            (tuple(d[a : a + SEQ_LEN]), int(d[a - 1]) if a else (EOS if bos_id is None else bos_id))
            for d in documents
            for a in range(0, len(d), SEQ_LEN)
        )
        assert sorted((tuple(tokens), int(before[0])) for tokens, before in pieces) == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_documents_do_not_move(tmp_path, algorithm):
    documents = random_documents(1, 40, 2 * SEQ_LEN)
    changed = [document.copy() for document in documents]
    changed[17][:-1] = (changed[17][:-1] + 5) % 400 + 3
    one = all_rows(write_store(tmp_path / "a", documents), tmp_path, algorithm)
    two = all_rows(write_store(tmp_path / "b", changed), tmp_path, algorithm)
    np.testing.assert_array_equal(one.segments, two.segments)
    np.testing.assert_array_equal(one.positions, two.positions)
    touched = {(row, segment) for row, segment in zip(*_differences(one, two, "targets"), strict=True)}
    leaked = {(row, segment) for row, segment in zip(*_differences(one, two, "inputs"), strict=True)}
    assert touched and leaked <= touched
    assert len(touched) <= len(documents[17]) // SEQ_LEN + 2


def _differences(one, two, field):
    row, column = np.nonzero(getattr(one, field) != getattr(two, field))
    return row.tolist(), one.segments[row, column].tolist()


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
def test_best_fit_fills_rows_and_overfills_none(seq_len):
    lengths = np.random.default_rng(2).integers(1, seq_len + 1, 3000)
    rows, num_rows = best_fit(lengths, seq_len)
    used = np.bincount(rows, weights=lengths, minlength=num_rows)
    assert rows.min() >= 0 and used.max() <= seq_len and used.min() > 0


def test_best_fit_is_best_fit_decreasing():
    """The groups give as many rows, equally filled, as the textbook's loop over single chunks."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        seq_len = int(rng.integers(5, 60))
        lengths = np.minimum(rng.geometric(0.1, 200), seq_len)
        room: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fits = [(free, row) for row, free in enumerate(room) if free >= length]
            if fits:
                room[min(fits)[1]] -= length
            else:
                room.append(seq_len - length)
        rows, num_rows = best_fit(lengths, seq_len)
        used = np.bincount(rows, weights=lengths, minlength=num_rows)
        assert sorted(seq_len - used) == sorted(room)


def test_cut_keeps_order_and_tokens():
    start, length, continued = cut_documents(np.array([0, 5, 15]), np.array([5, 10, 2]), 4)
    assert start.tolist() == [0, 4, 5, 9, 13, 15]
    assert length.tolist() == [4, 1, 4, 4, 2, 2]
    assert continued.tolist() == [False, True, False, True, True, False]


def test_density_on_real_text(shared_data):
    """At 2,048 at least .999 of the row is text: books, manuals and pages, four characters to a token."""
    lengths = []
    for path in sorted(Path(shared_data).glob("gutenberg/*.gz")):
        lengths.append(len(gzip.decompress(path.read_bytes())) // 4)
    for name in ("peps/peps", "rust-book/rust-book", "tldr/tldr-en", "tldr/tldr-12-langs", "web-articles/articles"):
        for line in gzip.decompress((shared_data / f"{name}.jsonl.gz").read_bytes()).splitlines():
            lengths.append(1 + max(len(value) for value in json.loads(line).values() if isinstance(value, str)) // 4)
    lengths = np.array(lengths)
    _, chunks, _ = cut_documents(np.cumsum(lengths) - lengths, lengths, 2048)
    _, rows = best_fit(chunks, 2048)
    assert chunks.sum() / (rows * 2048) >= 0.999


def test_plan_is_computed_once_and_reproducible(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s", random_documents(4, 50, 40), shards=2)
    for plans in (tmp_path / "one", tmp_path / "two"):
        open_packing(store, SEQ_LEN, "best_fit", plans)
    files = [sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("one", "two")]
    assert [p.name for p in files[0]] == ["chunks.bin", "plan.json", "rows.bin"]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    monkeypatch.setattr(packing, "_write_plan", lambda *a: pytest.fail("the plan was made again"))
    open_packing(TokenStore(tmp_path / "s"), SEQ_LEN, "best_fit", tmp_path / "one")


def test_a_large_store_is_planned_in_parts(tmp_path, monkeypatch):
    documents = random_documents(5, 200, 40)
    store = write_store(tmp_path / "s", documents, shards=6)
    monkeypatch.setattr(packing, "_PART_TOKENS", store.tokens // 3)
    assert sorted(len(tokens) for tokens, _ in unpack(all_rows(store, tmp_path, "best_fit"))) == sorted(
        cut_documents(store.starts(), store.lengths(), SEQ_LEN)[1].tolist()
    )


def _open_plan(folder):
    return open_packing(TokenStore(folder / "s"), SEQ_LEN, "best_fit", folder / "plans").rows


@pytest.mark.multiprocess
@pytest.mark.slow
def test_processes_may_plan_at_once(tmp_path):
    write_store(tmp_path / "s", random_documents(6, 500, 40))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_open_plan, [tmp_path] * 6))) == 1
    assert len(list((tmp_path / "plans").iterdir())) == 1


def test_second_process_uses_the_plan_of_the_first(tmp_path):
    store = write_store(tmp_path / "s", random_documents(6, 50, 40))
    open_packing(store, SEQ_LEN, "best_fit", tmp_path / "plans")
    (folder,) = (tmp_path / "plans").iterdir()
    before = (folder / "plan.json").stat().st_ino
    packing._write_plan(store, packing.RowBudget(seq_len=SEQ_LEN), "best_fit", folder)
    assert (folder / "plan.json").stat().st_ino == before
    assert [path.name for path in (tmp_path / "plans").iterdir()] == [folder.name]


def test_damaged_plan_and_bad_settings(tmp_path):
    store = write_store(tmp_path / "s", random_documents(6, 50, 40))
    open_packing(store, SEQ_LEN, "best_fit", tmp_path / "plans")
    (folder,) = (tmp_path / "plans").iterdir()
    content = (folder / "chunks.bin").read_bytes()
    for damaged, message in (
        (b"short", r"packing plan .*chunks\.bin has 5 bytes, expected \d+: .*delete .*best_fit-16-"),
        (content[:-1] + b"\7", r"packing plan .*chunks\.bin is damaged between bytes 0 and"),
    ):
        (folder / "chunks.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            open_packing(store, SEQ_LEN, "best_fit", tmp_path / "plans")
    (folder / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"packing plan .*plan\.json is damaged"):
        open_packing(store, SEQ_LEN, "best_fit", tmp_path / "plans")
    with pytest.raises(UserError, match=r"data\.packing='first_fit'"):
        open_packing(store, SEQ_LEN, "first_fit", tmp_path)
    with pytest.raises(UserError, match=r"data\.seq_len=0"):
        open_packing(store, 0, "concat", tmp_path)


def test_a_large_plan_is_read_from_disk(tmp_path, monkeypatch):
    """It gives the same rows; one that is truncated or changed during a run is an error, not a crash (SIGBUS)."""
    store = write_store(tmp_path / "s", random_documents(7, 300, 40))
    rows = np.random.default_rng(0).permutation(open_packing(store, SEQ_LEN, "best_fit", tmp_path / "plans").rows)
    expected = open_packing(store, SEQ_LEN, "best_fit", tmp_path / "plans").chunks(rows)
    monkeypatch.setattr(packing, "_MAX_BYTES_IN_MEMORY", 0)
    plan = open_packing(store, SEQ_LEN, "best_fit", tmp_path / "plans")
    for name, values in vars(plan.chunks(rows)).items():
        np.testing.assert_array_equal(values, getattr(expected, name), name)
        assert values.dtype == getattr(expected, name).dtype
    (path,) = (tmp_path / "plans").glob("*/chunks.bin")
    content = path.read_bytes()
    for damaged, message in ((content[:40], "has 40 bytes"), (content[::-1], "is damaged between bytes 0 and")):
        with open(path, "r+b") as file:
            file.truncate()
            file.write(damaged)
            file.truncate()
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # later than before even where the clock is coarse
        with pytest.raises(UserError, match=f"packing plan .*{message}"):
            plan.chunks(rows)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_empty_store_has_no_rows(tmp_path, algorithm):
    assert open_packing(write_store(tmp_path / "s", []), SEQ_LEN, algorithm, tmp_path).rows == 0
