"""Splits follow the content: exact fractions in the mean, near copies together, old documents where they were."""

import random

import numpy as np
import pytest

from llmjax.data.config import SplitConfig
from llmjax.data.store import minhash, near_duplicates, split
from llmjax.errors import UserError


def words(rng, count):
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def edited(rng, text, edits):
    text = list(text)
    for index in rng.sample(range(len(text)), edits):
        text[index] = "edited"
    return text


def shingles(text):
    return {tuple(text[i : i + 5]) for i in range(len(text) - 4)}


def signatures(texts):
    return np.stack([minhash.compute_signature(" ".join(text).encode()) for text in texts])


def numbered(table):
    return near_duplicates.Signatures([lambda: table], np.array([0, len(table)]))


def keys_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


def test_signatures_estimate_the_jaccard_similarity():
    rng, errors = random.Random(0), []
    for edits in (0, 5, 20, 60):
        for _ in range(10):
            a = words(rng, 400)
            b = edited(rng, a, edits)
            true = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
            equal = signatures([a, b])
            errors.append((equal[0] == equal[1]).mean() - true)
    # 112 values: a standard deviation of at most sqrt(0.25 / 112) = 0.047 each, 0.0075 in the mean of 40
    assert abs(np.mean(errors)) < 0.03 and np.max(np.abs(errors)) < 0.2


def test_word_hash_does_not_depend_on_block_edges(monkeypatch):
    text = " ".join(words(random.Random(1), 3000)).encode() + " 吾輩は猫である。名前はまだ無い。".encode()
    expected = minhash.compute_signature(text)
    monkeypatch.setattr(minhash, "_BLOCK_BYTES", 64)
    assert (minhash.compute_signature(text) == expected).all()


def test_scripts_without_spaces_have_words():
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 3
    a, b = minhash.compute_signature(text.encode()), minhash.compute_signature((text[:-3] + "ない。").encode())
    assert 0.5 < (a == b).mean() < 1


@pytest.mark.parametrize("data", [b"!", b"one", b"one two three", "é".encode(), b"\0"])
def test_tiny_texts_have_signatures(data):
    assert minhash.compute_signature(data).shape == (minhash.SIZE,)


def test_near_copies_share_a_key_and_others_do_not():
    rng = random.Random(2)
    texts, family = [], []
    for number in range(300):
        original = words(rng, 300)
        texts += [original, edited(rng, original, 1), edited(rng, original, 2)]
        family += [number] * 3
    keys, table = keys_of(len(texts)), signatures(texts)
    clusters = split.cluster_near_copies(keys, numbered(table))
    for number in range(300):
        mine = clusters[np.array(family) == number]
        # 1 and 2 edits in 300 words: similarity 0.93 and more, missed with probability 1e-5 by the band arithmetic
        assert len(set(mine.tolist())) == 1
        assert mine[0] == keys[np.array(family) == number].min()
    assert len(np.unique(clusters)) == 300


def test_a_crowded_band_is_searched_to_its_end():
    """Documents of several families that share a band: each is compared with its own family's first."""
    rng = random.Random(3)
    table = np.concatenate([np.tile(signatures([words(rng, 50)]), (20, 1)) for _ in range(5)])
    table[:, : minhash.ROWS] = 7
    clusters = split.cluster_near_copies(keys_of(100), numbered(table))
    assert len(np.unique(clusters)) == 5


def test_added_documents_do_not_move_old_ones():
    config = SplitConfig(validation=0.2, test=0.2)
    rng = random.Random(4)
    texts = [words(rng, 100) for _ in range(400)]
    keys, table = keys_of(400), signatures(texts)
    few = split.assign_splits(split.cluster_near_copies(keys[:200], numbered(table[:200])), config)
    many = split.assign_splits(split.cluster_near_copies(keys, numbered(table)), config)
    assert (many[:200] == few).all()


def test_fractions():
    splits = split.assign_splits(keys_of(20_000), SplitConfig(validation=0.1, test=0.3))
    counts = np.bincount(splits, minlength=3) / 20_000
    # binomial: a standard deviation of at most 0.0033
    assert np.allclose(counts, [0.6, 0.1, 0.3], atol=0.015)
    assert not split.assign_splits(keys_of(1000), SplitConfig(validation=0.0, test=0.0)).any()


def test_empty_splits_are_filled_while_clusters_remain():
    config = SplitConfig()
    for clusters in (1, 2, 3, 10):
        keys = np.repeat(keys_of(clusters) | np.uint64(1 << 63), 2)  # the upper half: all train
        filled = split.fill_empty(split.assign_splits(keys, config), keys, config)
        assert len(np.unique(filled)) == min(clusters, 3) and (filled == split.TRAIN).any()
        assert all(len(set(filled[keys == key].tolist())) == 1 for key in keys)
    lone = np.zeros(1, np.uint64)  # would validate
    assert split.fill_empty(split.assign_splits(lone, config), lone, config).tolist() == [split.TRAIN]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation": -0.1}, "validation=-0.1"),
        ({"test": 1.0}, "test=1.0"),
        ({"validation": 0.5, "test": 0.5}, "below 1"),
    ],
)
def test_invalid_fractions(fields, message):
    with pytest.raises(UserError, match=message):
        split.check_fractions(SplitConfig(**fields), "data.split")
