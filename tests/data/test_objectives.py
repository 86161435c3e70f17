"""The causal objective: what is foretold, from what, and what counts."""

import numpy as np

from llmjax.data.objectives import causal
from llmjax.data.packing import fill, open_packing
from tests.data.stores import BOS, EOS, write_store


def test_first_tokens_and_ends_are_targets_and_padding_is_not(tmp_path):
    store = write_store(tmp_path / "s", [np.array([10, 11, EOS]), np.array([20, EOS])])
    plan = open_packing(store, 8, "best_fit", tmp_path / "plans")
    batch = causal(fill(store, plan.chunks(np.arange(1)), 1, 8), np.array([(5 << 32) + 7]))
    np.testing.assert_array_equal(batch.inputs, [[BOS, 10, 11, BOS, 20, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[10, 11, EOS, 20, EOS, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.sample, [[5, 7]])
    dtypes = {name: value.dtype.name for name, value in vars(batch).items() if value is not None}
    assert dtypes == dict.fromkeys(("inputs", "targets", "segments", "positions"), "int32") | {
        "weights": "float32",
        "sample": "uint32",
    }


def test_a_continued_document_is_foretold_from_its_own_past(tmp_path):
    store = write_store(tmp_path / "s", [np.array([10, 11, 12, 13, 14, EOS])])
    for algorithm in ("best_fit", "concat"):
        plan = open_packing(store, 4, algorithm, tmp_path / "plans")
        batch = causal(fill(store, plan.chunks(np.arange(2)), 2, 4), np.arange(2))
        np.testing.assert_array_equal(batch.inputs, [[BOS, 10, 11, 12], [13, 14, 0, 0]])
        np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3], [0, 1, 0, 0]])
        assert batch.weights.sum() == 6
