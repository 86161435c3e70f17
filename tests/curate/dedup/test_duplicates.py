"""Copies are found, exact ones and edited ones, and nothing else; which of them stays depends on their rank alone."""

import functools
import itertools
import random

import numpy as np
import pytest

from llmjax.curate.config import DuplicatesConfig
from llmjax.curate.dedup import duplicates
from llmjax.curate.document import content_hash
from llmjax.curate.engine.measurements import Measurement
from llmjax.data.store import minhash, near_duplicates
from tests.curate import corpora


class InProcess:
    """A runner without processes; partitions come in the reverse order."""

    def map(self, function, tasks):
        return enumerate([function(*task) for task in tasks])

    def exchange(self, mapper, tasks, reducer, shared, folder):
        parted = {}
        for task in tasks:
            for part, rows in mapper(*task).items():
                parted.setdefault(part, []).append(rows)
        for part in sorted(parted, reverse=True):
            yield reducer(np.concatenate(parted[part]), *shared)


def found(folder, texts, *, rank=None, alive=None, stays=None, cuts=(), config=None):
    """duplicates.find for texts in as many units as the cuts make."""
    folder.mkdir(exist_ok=True)
    edges = np.array([0, *cuts, len(texts)])
    units = [Measurement(folder, str(number)) for number in range(len(edges) - 1)]
    signatures = [minhash.compute_signature(text.encode()) for text in texts]
    for unit, begin, end in zip(units, edges[:-1], edges[1:], strict=True):
        unit.signatures.write_bytes(b"".join(one.tobytes() for one in signatures[begin:end]))
    content = np.frombuffer(b"".join(map(content_hash, texts)), ">u8").reshape(-1, 2).astype(np.uint64)
    return duplicates.find(
        content,
        np.arange(len(texts)) if rank is None else np.asarray(rank),
        np.ones(len(texts), bool) if alive is None else np.asarray(alive, bool),
        np.zeros(len(texts), bool) if stays is None else np.asarray(stays, bool),
        units,
        edges,
        config or DuplicatesConfig(),
        InProcess(),
        folder / "exchange",
    )


@functools.cache
def shingles(text):
    words = text.split()
    return set(zip(*(words[offset:] for offset in range(5)), strict=False))


def similarity(one, other):
    one, other = shingles(one), shingles(other)
    return len(one & other) / len(one | other)


def words(count, seed=0):
    """A text of words that no other text has."""
    draw = random.Random(seed)
    return [f"w{seed}x{draw.randrange(1 << 30)}" for _ in range(count)]


def test_edited_copies_are_found_and_unlike_texts_stay(tmp_path):
    """Bands cut once would find .989 and .48 of them."""
    plain = [" ".join(text.split()) for text in corpora.documents()]
    plain = [text for text in plain if len(shingles(text)) >= 60]
    unlike = [text for n, text in enumerate(plain) if all(similarity(text, other) < 0.2 for other in plain[:n])]
    draw, copies = random.Random(0), []
    for target in (0.91, 0.85, 0.68):
        for place, text in enumerate(unlike):
            parts = text.split()
            while similarity(text, " ".join(parts)) > target + 0.015:
                parts[draw.randrange(len(parts))] = f"other{draw.randrange(10_000)}"
            if similarity(text, " ".join(parts)) > target - 0.015:
                copies.append((target, place, " ".join(parts)))
    drawn = draw.sample(copies, len(copies))
    texts, kept = [*unlike, *(text for _, _, text in drawn)], {}
    # One similarity at a time, so that copies do not meet over other copies.
    for target in (0.91, 0.85, 0.68):
        alive = [True] * len(unlike) + [near_duplicates == target for near_duplicates, _, _ in drawn]
        made = found(tmp_path, texts, alive=alive, cuts=(len(unlike) // 2, len(texts) // 2))
        assert made.kept_as[: len(unlike)].tolist() == list(range(len(unlike)))
        hits = [
            made.kept_as[len(unlike) + n] == place
            for n, (near_duplicates, place, _) in enumerate(drawn)
            if near_duplicates == target
        ]
        kept[target] = sum(hits) / len(hits)
        assert len(hits) > 100 and not made.exact.any()
    assert kept[0.91] >= 0.97 and kept[0.85] >= 0.99 and kept[0.68] >= 0.55


def test_exact_copies_differ_in_case_and_spacing_at_most(tmp_path):
    text = " ".join(words(40))
    texts = [text, "unlike", text.upper(), f"  {text}\n", text + " more"]
    config = DuplicatesConfig(near=False)
    made = found(tmp_path, texts, config=config)
    assert made.kept_as.tolist() == [0, 1, 0, 0, 4] and made.cluster.tolist() == [0, 1, 0, 0, 4]
    assert made.exact.tolist() == [False, False, True, True, False]


def test_near_alone_finds_equal_texts_too_but_not_as_exact(tmp_path):
    text = words(100)
    texts = [" ".join(text), " ".join(text), " ".join(text[:-2]), "unlike"]
    made = found(tmp_path, texts, config=DuplicatesConfig(exact=False))
    assert made.kept_as.tolist() == [0, 0, 0, 3] and not made.exact.any()


def test_a_chain_keeps_both_of_its_ends(tmp_path):
    """Every link is like its neighbours; what is too far from the one that stays, stays."""
    text, chain = words(200), []
    for link in range(9):
        chain.append(" ".join(text[15 * link :] + words(15 * link, seed=1)))
    assert min(similarity(a, b) for a, b in itertools.pairwise(chain)) > 0.8
    assert similarity(chain[0], chain[-1]) < 0.4
    made = found(tmp_path, chain)
    assert made.cluster.tolist() == [0] * 9
    stays = np.flatnonzero(made.kept_as == np.arange(9)).tolist()
    assert stays[0] == 0 and 2 <= len(stays) <= 4
    for link, kept in enumerate(made.kept_as.tolist()):
        assert kept == link or similarity(chain[link], chain[kept]) > 0.5


def test_nothing_in_nothing_out(tmp_path):
    for texts, cuts, alive in (([], (), []), ([], (0,), []), (["one two", "one two"], (1,), [False, False])):
        made = found(tmp_path, texts, cuts=cuts, alive=alive)
        assert made.kept_as.tolist() == made.cluster.tolist() == list(range(len(texts)))
        assert not made.exact.any()


def test_what_was_dropped_before_is_no_copy_and_has_none(tmp_path):
    text = " ".join(words(60))
    made = found(tmp_path, [text, text, text, text], alive=[False, True, False, True])
    assert made.kept_as.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("cuts", [(), (7,), (0, 40, 40, 90)])
def test_only_rank_says_which_stays(tmp_path, cuts):
    base = corpora.documents()[:50]
    texts = base + [corpora.changed(text, 1 + n % 4, n) for n, text in enumerate(base)]
    draw = random.Random(len(cuts))
    rank = draw.sample(range(len(texts)), len(texts))
    first = found(tmp_path / "one", texts, rank=rank)
    assert (first.kept_as != np.arange(len(texts))).sum() > 30
    assert all(rank[kept] <= rank[n] for n, kept in enumerate(first.kept_as.tolist()))
    # The same documents in another order and other units: the same ones stay.
    order = draw.sample(range(len(texts)), len(texts))
    other = found(tmp_path / "two", [texts[n] for n in order], rank=[rank[n] for n in order], cuts=cuts)
    assert {order[n]: order[kept] for n, kept in enumerate(other.kept_as.tolist())} == dict(
        enumerate(first.kept_as.tolist())
    )
    assert {order[n]: order[kept] for n, kept in enumerate(other.cluster.tolist())} == dict(
        enumerate(first.cluster.tolist())
    )


def test_a_band_of_many_unlike_texts_ends(tmp_path, monkeypatch):
    """More leaders than are compared: what shares one band with them by chance is left alone, real copies are found."""
    monkeypatch.setattr(near_duplicates, "_MAX_ROUNDS", 3)
    draw = np.random.default_rng(0)
    signatures = draw.integers(0, 1 << 32, (40, minhash.SIZE), np.uint32)
    signatures[:, : minhash.ROWS] = 7  # one band that all share
    signatures[20:] = signatures[:20]
    unit = Measurement(tmp_path, "0")
    unit.signatures.write_bytes(signatures.tobytes())
    content = draw.integers(0, 1 << 63, (40, 2), np.uint64)
    edges, rank, alive, stays = np.array([0, 40]), np.arange(40), np.ones(40, bool), np.zeros(40, bool)
    config, folder = DuplicatesConfig(), tmp_path / "exchange"
    made = duplicates.find(content, rank, alive, stays, [unit], edges, config, InProcess(), folder)
    assert made.kept_as.tolist() == [*range(20), *range(20)]


def test_what_stays_goes_for_an_exact_copy_alone(tmp_path):
    text = " ".join(words(100))
    texts = [text, " ".join(text.split()[:-2]), text.upper(), " ".join(text.split()[:-3])]
    assert found(tmp_path, texts).kept_as.tolist() == [0, 0, 0, 0]
    assert found(tmp_path, texts, stays=[True, True, True, False]).kept_as.tolist() == [0, 1, 0, 0]


def test_similarity_is_the_bound(tmp_path):
    text = words(300)
    near_duplicates = " ".join(text[:-20] + words(20, seed=1))
    assert 0.84 < similarity(" ".join(text), near_duplicates) < 0.9
    for bound, kept in ((0.6, [0, 0]), (0.95, [0, 1])):
        made = found(tmp_path, [" ".join(text), near_duplicates], config=DuplicatesConfig(similarity=bound))
        assert made.kept_as.tolist() == kept
