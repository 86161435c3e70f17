"""Intervals cover the true value as often as they say, and files of tasks are written once for each key."""

import dataclasses
import json

from etils import epath
import numpy as np
import pytest
import scipy.stats

from llmjax.evals import results
from llmjax.evals.results import Estimate, TaskResult
from llmjax.run import config as run_config
from tests.evals.test_requests import make_loaded


def test_intervals_equal_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).exponential(size=200)
    [(name, mean)] = results.estimate_means({"x": values}, draws=4000).items()
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert name == "x" and mean.value == pytest.approx(values.mean())
    # Of 4000 draws, an end of the interval is known to about a fiftieth of its width.
    assert [mean.low, mean.high] == pytest.approx(list(expected), abs=0.01)


def test_any_statistic_has_the_interval_of_its_resamples():
    values = np.random.default_rng(1).normal(size=50)
    [mean] = results.estimate(lambda at: {"mean": values[at].mean()}, 50).values()
    [expected] = results.estimate_means({"mean": values}).values()
    assert mean.value == pytest.approx(expected.value)
    assert mean.low == pytest.approx(expected.low) and mean.high == pytest.approx(expected.high)


def test_the_interval_of_an_accuracy_covers_it_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        [accuracy] = results.estimate_means({"acc": rng.random(100) < 0.7}, draws=400).values()
        assert accuracy.low is not None and accuracy.high is not None
        covered += accuracy.low <= 0.7 <= accuracy.high
    assert 0.9 < covered / 300 < 0.98


def test_numbers_that_the_examples_do_not_define_are_none():
    def share(at):
        return {"never": float("nan"), "sometimes": 1.0 if 0 in at else float("nan")}

    numbers = results.estimate(share, 3, draws=50)
    assert numbers["never"] == Estimate(value=None, low=None, high=None)
    assert numbers["sometimes"] == Estimate(value=1.0, low=1.0, high=1.0)
    assert str(numbers["never"]) == "undefined" and str(numbers["sometimes"]) == "1.0000 [1.0000, 1.0000]"


def test_files_of_a_task_are_read_back_for_the_same_key_alone(tmp_path):
    workdir, loaded = epath.Path(tmp_path), dataclasses.replace(make_loaded(), step=7, fingerprint="ab")
    result = TaskResult(
        task="mine",
        metrics={"acc": Estimate(value=0.5, low=0.0, high=1.0)},
        examples=[{"index": 0, "prompt": "é\ud800", "score": np.float32(2)}, {"index": 1, "score": float("nan")}],
        settings={"shots": 2},
        details={"confusion": np.eye(2, dtype=int)},
    )
    key = results.make_key(loaded, {"text": "a"})
    assert results.read_cached(workdir, 7, "mine", key) is None
    path = results.write(workdir, loaded, result, key)
    assert path == workdir / "eval" / "7" / "mine.json"
    record = results.read_cached(workdir, 7, "mine", key)
    assert record is not None and record == json.loads(path.read_text())
    assert {name: record[name] for name in ("task", "step", "n", "settings", "confusion")} == {
        "task": "mine",
        "step": 7,
        "n": 2,
        "settings": {"shots": 2},
        "confusion": [[1, 0], [0, 1]],
    }
    assert record["metrics"] == {"acc": {"value": 0.5, "low": 0.0, "high": 1.0}}
    lines = (path.parent / "mine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["score"] for line in lines] == [2.0, None] and json.loads(lines[0])["prompt"][0] == "é"
    assert results.describe(record) == ["mine: 2 examples, with 95% intervals", "  acc  0.5000 [0.0000, 1.0000]"]
    (path.parent / "mine.jsonl").unlink()
    assert results.read_cached(workdir, 7, "mine", key) is None


def test_the_key_depends_on_parameters_model_task_and_length():
    loaded = make_loaded()
    longer = run_config.with_fields(loaded.config, [("data.seq_len", 32)])
    others = [
        results.make_key(dataclasses.replace(loaded, fingerprint="other"), {"text": "a"}),
        results.make_key(dataclasses.replace(loaded, config=longer), {"text": "a"}),
        results.make_key(loaded, {"text": "b"}),
    ]
    key = results.make_key(loaded, {"text": "a"})
    assert results.make_key(make_loaded(), {"text": "a"}) == key and len({key, *others}) == 4
