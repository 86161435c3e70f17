"""The mixture: exact shares at every block edge, each source read in order without gap, the past fixed for ever."""

import numpy as np
import pytest

from llmjax.data.batches.mixture import Mixture
from llmjax.errors import UserError


def mixture(weights, rows=None, *, block=16, **options):
    names = [f"s{i}" for i in range(len(weights))]
    return Mixture(names, rows or [100] * len(weights), weights, block=block, **options)


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("weights", [[1], [0.5, 0.5], [0.7, 0.2, 0.1], [3, 0, 1], [5, 3, 2, 0.6, 0.4]])
def test_each_source_is_read_in_order_without_gap(weights, block):
    source, ordinal = mixture(weights, block=block).locate(np.arange(2000))
    for index in range(len(weights)):
        np.testing.assert_array_equal(ordinal[source == index], np.arange((source == index).sum()))
        assert ((source == index).any()) == (weights[index] > 0)


@pytest.mark.parametrize(
    "weights", [[0.7, 0.2, 0.1], [1, 1, 1], [3, 0, 1], [np.pi, np.e, 1, 0.5, 0.3], list(range(1, 12))]
)
def test_drift_is_below_one_sample_at_every_block_edge(weights):
    block = 64
    mixed, shares = mixture(weights, block=block), np.array(weights) / sum(weights)
    for far in (0, 10**9 // block, 10**12 // block):
        for edge in range(far, far + 300):
            counts = mixed.count_samples(edge * block)
            assert counts.sum() == edge * block
            # At 10**12 samples the float64 share itself is off by up to 2e-4 of a sample.
            assert np.abs(counts - edge * block * shares).max() < 1 + 1e-3


def test_counts_of_rare_sources_never_shrink():
    """Shares below one a block, where plain largest remainders would give some block a negative count."""
    weights = [1000, 1.7, 0.9, 0.31, 0.3, 0.29, 0.003]
    mixed, shares = mixture(weights, block=64), np.array(weights) / sum(weights)
    counts = np.stack([mixed.count_samples(edge * 64) for edge in range(3000)])
    assert (np.diff(counts, axis=0) >= 0).all()
    drift = np.abs(counts - counts.sum(axis=1, keepdims=True) * shares).max(axis=0)
    assert (drift[:2] < 1).all()
    assert (drift[2:] < 1.5).all()  # half a sample for the pool and for each halving, shrunk by the shares on the way


def test_counts_agree_with_locate():
    mixed = mixture([5, 3, 0.01], schedule=((100, (("s0", 1), ("s2", 1))), (230, (("s1", 1),))))
    source, _ = mixed.locate(np.arange(400))
    for samples in (0, 1, 99, 100, 101, 163, 230, 400):
        np.testing.assert_array_equal(mixed.count_samples(samples), np.bincount(source[:samples], minlength=3))


def test_samples_can_be_located_in_any_order_and_batch():
    mixed = mixture([5, 3, 2])
    order = np.random.default_rng(0).permutation(1000)
    source, ordinal = mixed.locate(np.arange(1000))
    one = [mixture([5, 3, 2]).locate(np.array([sample])) for sample in order[:50]]
    np.testing.assert_array_equal([s[0] for s, _ in one], source[order[:50]])
    np.testing.assert_array_equal([o[0] for _, o in one], ordinal[order[:50]])


def test_order_inside_a_block_depends_on_seed_and_block():
    source, _ = mixture([1, 1], block=256).locate(np.arange(1024))
    blocks = source.reshape(4, 256)
    assert (blocks.sum(axis=1) == 128).all()
    assert np.abs(blocks.reshape(4, 8, 32).sum(axis=2) - 16).max() < 14  # no block is sorted by source
    assert len({tuple(block) for block in blocks}) == 4
    assert (mixture([1, 1], block=256, seed=1).locate(np.arange(1024))[0] != source).any()


def test_weights_default_to_the_number_of_rows():
    mixed = mixture([None, None, None], rows=[300, 100, 0])
    np.testing.assert_array_equal(mixed.count_samples(1600), [1200, 400, 0])


def test_later_segment_does_not_change_earlier_samples():
    long = np.arange(3000)
    plain, planned = mixture([3, 1]), mixture([3, 1], schedule=((1001, (("s1", 1),)),))
    extended = mixture([3, 1], schedule=((1001, (("s1", 1),)), (2000, (("s0", 1), ("s1", 9)))))
    for a, b, until in ((plain, planned, 1001), (planned, extended, 2000)):
        for one, other in zip(a.locate(long[:until]), b.locate(long[:until]), strict=True):
            np.testing.assert_array_equal(one, other)
        assert a.fingerprint(until) == b.fingerprint(until)
        assert a.fingerprint(until + 1) != b.fingerprint(until + 1)
    source, ordinal = extended.locate(long)
    assert (source[1001:2000] == 1).all()
    np.testing.assert_array_equal(ordinal[source == 1], np.arange((source == 1).sum()))


def test_redistribute_gives_every_row_once_and_ends():
    rows = [50, 333, 7]
    mixed = mixture([1, 1, 1], rows=rows, at_end="redistribute")
    assert mixed.num_samples == sum(rows)
    source, ordinal = mixed.locate(np.arange(sum(rows)))
    for index, size in enumerate(rows):
        np.testing.assert_array_equal(ordinal[source == index], np.arange(size))
    assert (np.bincount(source[:18]) == 6).all()  # equal shares while all last
    assert (source[200:] == 1).all()


def test_redistribute_follows_a_schedule():
    rows = [50, 333, 7]
    mixed = mixture([1, 0, 1], rows=rows, at_end="redistribute", schedule=((40, (("s1", 1),)),))
    source, _ = mixed.locate(np.arange(mixed.num_samples))
    assert mixed.num_samples == 40 + 333
    np.testing.assert_array_equal(np.bincount(source[:40]), [33, 0, 7])
    assert mixture([1, 0, 1], rows=rows, at_end="redistribute", schedule=((60, (("s1", 1),)),)).num_samples == 57


def test_repeat_has_no_end():
    mixed = mixture([1, 1], rows=[3, 5])
    assert mixed.num_samples is None
    _, ordinal = mixed.locate(np.array([10**15]))
    assert 4 * 10**14 < ordinal[0] < 6 * 10**14


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1, None], {}, r"data\.sources\.s1\.weight is not set"),
        ([1, -1], {}, r"data\.sources\.s1\.weight=-1"),
        ([1, float("nan")], {}, r"data\.sources\.s1\.weight=nan"),
        ([0, 0], {}, "all weights are 0"),
        ([None, None], {"rows": [0, 0]}, "no training tokens in s0, s1"),
        ([1, 1], {"rows": [5, 0]}, r"data\.sources\.s1\.weight=1\.?0?: the source has no training tokens"),
        ([1, 1], {"block": 0}, r"data\.mixture_block=0"),
        ([1, 1], {"at_end": "stop"}, r"data\.at_source_end='stop'"),
        ([1, 1], {"schedule": ((5, (("s7", 1),)),)}, r"data\.weight_schedule from 5: s7: unknown source"),
        ([1, 1], {"schedule": ((5, (("s0", -2),)),)}, r"data\.weight_schedule from 5: s0=-2"),
        ([1, 1], {"schedule": ((5, ()),)}, "all weights are 0"),
        ([1, 1], {"schedule": ((0, (("s0", 1),)),)}, r"data\.weight_schedule entry .*above 0"),
        ([1, 1], {"schedule": ((9, (("s0", 1),)), (9, (("s1", 1),)))}, "rising"),
        ([1, 1], {"schedule": (9,)}, r"data\.weight_schedule entry 9"),
    ],
)
def test_invalid_weights_are_refused(weights, options, message):
    with pytest.raises(UserError, match=message):
        mixture(weights, **options)


def test_a_source_of_weight_zero_may_be_empty():
    mixed = mixture([1, 0], rows=[5, 0])
    np.testing.assert_array_equal(mixed.count_samples(32), [32, 0])
