"""The best evaluation and the end of a run by it: the functions, and a real run that is stopped and resumed."""

import math

import pytest

from llmjax.errors import UserError
from llmjax.run.config import CheckpointConfig, EvalConfig, RunConfig
from llmjax.train.best import find_best, is_exhausted, select_scores
from tests import jobs


def history(metric: str, *values: float) -> dict:
    return {10 * (i + 1): {metric: value} for i, value in enumerate(values)}


def test_the_best_is_the_first_of_the_smallest_losses_or_largest_other_scores():
    assert find_best({}, "loss") is None
    assert find_best(history("loss", 3, 2, 2, 4), "loss") == 20
    assert find_best(history("accuracy", 0.3, 0.2, 0.4), "accuracy") == 30
    assert find_best(history("loss", math.nan, 5, math.nan), "loss") == 20
    for metric, best in (("mine/rmse", 20), ("mine/bits_per_byte/news", 20), ("loss/acc", 30), ("mine/acc/loss", 30)):
        assert find_best(history(metric, 3, 2, 4), metric) == best


def test_a_run_ends_after_evaluations_without_improvement():
    losses = history("loss", 3, 2, 2.5, 2.0)
    assert is_exhausted(losses, "loss", 2)
    assert not is_exhausted(losses, "loss", 3) and not is_exhausted(losses, "loss", 0)
    assert not is_exhausted({}, "loss", 1)


def test_an_unknown_metric_is_refused():
    scores = {"total": {"loss": 1.0, "accuracy": 0.5, "num_targets": 7, "bits_per_byte": None}}
    assert select_scores(scores, "loss") == {"loss": 1.0, "accuracy": 0.5}
    with pytest.raises(UserError, match=r"eval.metric='acuracy' \(did you mean 'accuracy'\?\): .* are loss, accuracy"):
        select_scores(scores, "acuracy")
    tasks = {"tasks": {"mine/acc": 0.75}}
    assert select_scores(scores | tasks, "mine/acc") == {"loss": 1.0, "accuracy": 0.5, "mine/acc": 0.75}


def test_what_compares_evaluations_needs_some():
    with pytest.raises(UserError, match=r"eval.stop_after=2: .* set eval.every"):
        RunConfig(eval=EvalConfig(stop_after=2))
    with pytest.raises(UserError, match=r"checkpoint.keep_best=True: .* set eval.every"):
        RunConfig(checkpoint=CheckpointConfig(keep_best=True))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_stops_early_and_keeps_the_best_checkpoint_also_if_it_was_interrupted(tmp_path):
    """At a rate that soon makes the loss worse. The second run is stopped at an evaluation, which it repeats."""
    corpus = jobs.write_corpus(tmp_path / "corpus", 20)
    changes = {
        "train__epochs": 50,
        "optimizer__learning_rate": 3.0,
        "eval__every": 2,
        "eval__stop_after": 3,
        "checkpoint__keep_best": "true",
        "checkpoint__keep": 1,
        "data__store": tmp_path / "store",
        "train__compilation_cache": tmp_path / "compiled",
        "model__num_layers": 1,
    }
    command = lambda name, **more: jobs.command("train", tmp_path / name, corpus, **changes, **more)
    printed = jobs.run(command("unbroken"), LLMJAX_CPU_DEVICES="2")
    assert "train.epochs=50: " in printed and "stopping early at step" in printed
    jobs.run(command("broken", train__stop_at=4), LLMJAX_CPU_DEVICES="2")
    again = jobs.run(command("broken"), LLMJAX_CPU_DEVICES="2")
    assert "resuming at step 4" in again
    unbroken, broken = (jobs.checkpoints(tmp_path / name) for name in ("unbroken", "broken"))
    assert {step: each["fingerprint"] for step, each in broken.items()} == {
        step: each["fingerprint"] for step, each in unbroken.items()
    }
    last = max(unbroken)
    best = last - 6  # three evaluations earlier
    assert set(unbroken) == {best, last}
    assert f"at step {best}; use it by --step={best}" in printed
    assert "eval.stop_after=3 ended training" in jobs.run(command("unbroken"), LLMJAX_CPU_DEVICES="2")
