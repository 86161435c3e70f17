"""Exact and edited copies are found, and nothing else; which one is kept depends on their rank alone."""

import functools
import itertools
import random

import numpy as np
import pytest

from llmjax.curate.config import DuplicatesConfig
from llmjax.curate.dedup import duplicates
from llmjax.curate.document import hash_content
from llmjax.curate.engine.measurements import Measurement
from llmjax.data.store import minhash, near_duplicates
from tests.curate import corpora


def exchange(mapper, tasks, reducer, shared):
    """Runner.exchange in this process; partitions come in reverse order."""
    rows_by_partition = {}
    for task in tasks:
        for partition, rows in mapper(*task).items():
            rows_by_partition.setdefault(partition, []).append(rows)
    for partition in sorted(rows_by_partition, reverse=True):
        yield reducer(np.concatenate(rows_by_partition[partition]), *shared)


def find_copies(folder, texts, *, rank=None, is_active=None, is_protected=None, cuts=(), config=None):
    """duplicates.find_copies for texts in units that begin at the cuts."""
    folder.mkdir(exist_ok=True)
    offsets = np.array([0, *cuts, len(texts)])
    units = [Measurement(folder, str(number)) for number in range(len(offsets) - 1)]
    signatures = [minhash.compute_signature(text.encode()) for text in texts]
    for unit, begin, end in zip(units, offsets[:-1], offsets[1:], strict=True):
        unit.signatures.write_bytes(b"".join(one.tobytes() for one in signatures[begin:end]))
    content = np.frombuffer(b"".join(map(hash_content, texts)), ">u8").reshape(-1, 2).astype(np.uint64)
    documents = duplicates.Candidates(
        content,
        np.arange(len(texts)) if rank is None else np.asarray(rank),
        np.ones(len(texts), bool) if is_active is None else np.asarray(is_active, bool),
        np.zeros(len(texts), bool) if is_protected is None else np.asarray(is_protected, bool),
    )
    return duplicates.find_copies(documents, units, offsets, config or DuplicatesConfig(), exchange)


@functools.cache
def shingles(text):
    words = text.split()
    return set(zip(*(words[offset:] for offset in range(5)), strict=False))


def similarity(one, other):
    one, other = shingles(one), shingles(other)
    return len(one & other) / len(one | other)


def random_words(count, seed=0):
    """Words that do not occur with another seed."""
    draw = random.Random(seed)
    return [f"w{seed}x{draw.randrange(1 << 30)}" for _ in range(count)]


def test_edited_copies_are_found_and_other_texts_are_kept(tmp_path):
    """One division into bands would find .989 and .48 of them."""
    plain = [" ".join(text.split()) for text in corpora.documents()]
    plain = [text for text in plain if len(shingles(text)) >= 60]
    unlike = [text for n, text in enumerate(plain) if all(similarity(text, other) < 0.2 for other in plain[:n])]
    draw, edited = random.Random(0), []
    for target in (0.91, 0.85, 0.68):
        for original, text in enumerate(unlike):
            parts = text.split()
            while similarity(text, " ".join(parts)) > target + 0.015:
                parts[draw.randrange(len(parts))] = f"other{draw.randrange(10_000)}"
            if similarity(text, " ".join(parts)) > target - 0.015:
                edited.append((target, original, " ".join(parts)))
    edited = draw.sample(edited, len(edited))
    texts, recall = [*unlike, *(text for _, _, text in edited)], {}
    # One similarity at a time, so that copies are not connected by other copies.
    for target in (0.91, 0.85, 0.68):
        is_active = [True] * len(unlike) + [true_similarity == target for true_similarity, _, _ in edited]
        copies = find_copies(tmp_path, texts, is_active=is_active, cuts=(len(unlike) // 2, len(texts) // 2))
        assert copies.representative[: len(unlike)].tolist() == list(range(len(unlike)))
        hits = [
            copies.representative[len(unlike) + n] == original
            for n, (true_similarity, original, _) in enumerate(edited)
            if true_similarity == target
        ]
        recall[target] = sum(hits) / len(hits)
        assert len(hits) > 100 and not copies.is_exact.any()
    assert recall[0.91] >= 0.97 and recall[0.85] >= 0.99 and recall[0.68] >= 0.55


def test_exact_copies_may_differ_in_case_and_spacing(tmp_path):
    text = " ".join(random_words(40))
    texts = [text, "unlike", text.upper(), f"  {text}\n", text + " more"]
    config = DuplicatesConfig(near=False)
    copies = find_copies(tmp_path, texts, config=config)
    assert copies.representative.tolist() == [0, 1, 0, 0, 4] and copies.cluster.tolist() == [0, 1, 0, 0, 4]
    assert copies.is_exact.tolist() == [False, False, True, True, False]


def test_near_without_exact_also_finds_equal_texts(tmp_path):
    text = random_words(100)
    texts = [" ".join(text), " ".join(text), " ".join(text[:-2]), "unlike"]
    copies = find_copies(tmp_path, texts, config=DuplicatesConfig(exact=False))
    assert copies.representative.tolist() == [0, 0, 0, 3] and not copies.is_exact.any()


def test_both_ends_of_a_chain_of_changes_are_kept(tmp_path):
    """Every text is similar to its neighbours; those that are not similar to the first are kept."""
    text, chain = random_words(200), []
    for link in range(9):
        chain.append(" ".join(text[15 * link :] + random_words(15 * link, seed=1)))
    assert min(similarity(a, b) for a, b in itertools.pairwise(chain)) > 0.8
    assert similarity(chain[0], chain[-1]) < 0.4
    copies = find_copies(tmp_path, chain)
    assert copies.cluster.tolist() == [0] * 9
    kept = np.flatnonzero(copies.representative == np.arange(9)).tolist()
    assert kept[0] == 0 and 2 <= len(kept) <= 4
    for link, other in enumerate(copies.representative.tolist()):
        assert other == link or similarity(chain[link], chain[other]) > 0.5


def test_no_documents_or_no_active_documents(tmp_path):
    for texts, cuts, is_active in (([], (), []), ([], (0,), []), (["one two", "one two"], (1,), [False, False])):
        copies = find_copies(tmp_path, texts, cuts=cuts, is_active=is_active)
        assert copies.representative.tolist() == copies.cluster.tolist() == list(range(len(texts)))
        assert not copies.is_exact.any()


def test_inactive_documents_are_not_compared(tmp_path):
    text = " ".join(random_words(60))
    copies = find_copies(tmp_path, [text, text, text, text], is_active=[False, True, False, True])
    assert copies.representative.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("cuts", [(), (7,), (0, 40, 40, 90)])
def test_rank_alone_decides_which_copy_is_kept(tmp_path, cuts):
    base = corpora.documents()[:50]
    texts = base + [corpora.replace_words(text, 1 + n % 4, n) for n, text in enumerate(base)]
    draw = random.Random(len(cuts))
    rank = draw.sample(range(len(texts)), len(texts))
    first = find_copies(tmp_path / "one", texts, rank=rank)
    assert (first.representative != np.arange(len(texts))).sum() > 30
    assert all(rank[kept] <= rank[n] for n, kept in enumerate(first.representative.tolist()))
    # The same documents in another order and in other units: the same ones are kept.
    order = draw.sample(range(len(texts)), len(texts))
    other = find_copies(tmp_path / "two", [texts[n] for n in order], rank=[rank[n] for n in order], cuts=cuts)
    assert {order[n]: order[kept] for n, kept in enumerate(other.representative.tolist())} == dict(
        enumerate(first.representative.tolist())
    )
    assert {order[n]: order[kept] for n, kept in enumerate(other.cluster.tolist())} == dict(
        enumerate(first.cluster.tolist())
    )


def test_a_band_of_many_different_texts_terminates(tmp_path, monkeypatch):
    """With more texts than rounds of comparisons, real copies are still found."""
    monkeypatch.setattr(near_duplicates, "_MAX_ROUNDS", 3)
    draw = np.random.default_rng(0)
    signatures = draw.integers(0, 1 << 32, (40, minhash.SIZE), np.uint32)
    signatures[:, : minhash.ROWS] = 7  # one band is the same in all
    signatures[20:] = signatures[:20]
    unit = Measurement(tmp_path, "0")
    unit.signatures.write_bytes(signatures.tobytes())
    content = draw.integers(0, 1 << 63, (40, 2), np.uint64)
    documents = duplicates.Candidates(content, np.arange(40), np.ones(40, bool), np.zeros(40, bool))
    copies = duplicates.find_copies(documents, [unit], np.array([0, 40]), DuplicatesConfig(), exchange)
    assert copies.representative.tolist() == [*range(20), *range(20)]


def test_protected_documents_are_dropped_only_as_exact_copies(tmp_path):
    text = " ".join(random_words(100))
    texts = [text, " ".join(text.split()[:-2]), text.upper(), " ".join(text.split()[:-3])]
    assert find_copies(tmp_path, texts).representative.tolist() == [0, 0, 0, 0]
    assert find_copies(tmp_path, texts, is_protected=[True, True, True, False]).representative.tolist() == [0, 1, 0, 0]


def test_the_similarity_threshold_decides(tmp_path):
    text = random_words(300)
    near_copy = " ".join(text[:-20] + random_words(20, seed=1))
    assert 0.84 < similarity(" ".join(text), near_copy) < 0.9
    for bound, kept in ((0.6, [0, 0]), (0.95, [0, 1])):
        copies = find_copies(tmp_path, [" ".join(text), near_copy], config=DuplicatesConfig(similarity=bound))
        assert copies.representative.tolist() == kept
