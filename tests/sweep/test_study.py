"""Trials of a sweep, with a program in place of training: scores, failures, pruning, and processes that are killed."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

from etils import epath
import pytest

from llmjax.errors import UserError
from llmjax.run import workdir as workdirs
from llmjax.sweep import space, study, training
from tests.jobs import ROOT, environment


def make_plan(texts=("optimizer.learning_rate=uniform(0,1)",), *, trials=4, pause=0.0, bad="", **changes) -> study.Plan:
    """A plan whose trials have their first parameter as loss; those with the value `bad` fail."""

    def command(overrides, folder):
        value = overrides[0][1]
        loss = "999" if value == bad else value
        return [sys.executable, "-m", "tests.sweep.fake_train", str(folder), loss, str(pause)]

    fields = dict(metric="loss", keeps_best=False, sampler="random", pruner="none", seed=0, trials=trials)
    return study.Plan(ranges=space.parse(texts), command=command, **{**fields, **changes})


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(training, "_POLL_SECONDS", 0.02)


def test_the_winner_has_the_lowest_score_and_a_failed_trial_does_not_end_the_sweep(tmp_path):
    plan = make_plan(["model.embed=choice(3,1,7,2)"], sampler="grid", bad="7", trials=9)
    assert study.run_trials(plan, epath.Path(tmp_path)) == 0
    trials = study.list_results(plan, epath.Path(tmp_path))
    assert [trial.overrides[0][1] for trial in trials] == ["3", "1", "7", "2"]
    assert [trial.state for trial in trials] == ["complete", "complete", "failed", "complete"]
    assert trials[2].error == "model.embed=7: must be even"
    assert [trial.seconds for trial in trials] == [3.0, 3.0, None, 3.0]
    winner = study.find_winner(trials, "loss")
    assert winner is not None and winner.number == 1 and winner.score == pytest.approx(1 + 1 / 3)
    assert training.quote_flags(winner.overrides) == "--config.model.embed=1"


def test_more_trials_extend_a_sweep_and_draws_repeat(tmp_path):
    for name, counts in (("a", (1, 3)), ("b", (3,))):
        for count in counts:
            (tmp_path / name).mkdir(exist_ok=True)
            study.run_trials(make_plan(trials=count), epath.Path(tmp_path / name))
    drawn = [[t.overrides for t in study.list_results(make_plan(), epath.Path(tmp_path / name))] for name in "ab"]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3
    assert len({overrides[0] for overrides in drawn[0]}) == 3


def test_a_trial_worse_than_the_median_is_pruned(tmp_path):
    values = "1,2,3,4,50"
    plan = make_plan([f"model.embed=choice({values})"], sampler="grid", pruner="median", trials=5, pause=0.15)
    study.run_trials(plan, epath.Path(tmp_path))
    trials = study.list_results(plan, epath.Path(tmp_path))
    assert [trial.state for trial in trials] == ["complete"] * 4 + ["pruned"]
    assert not (study.trial_folder(epath.Path(tmp_path), 4) / "eval" / "3").exists(), "it was not stopped"
    assert study.find_winner(trials, "loss") == trials[0]


def test_a_killed_sweep_resumes_its_running_trial(tmp_path):
    code = (
        "from etils import epath; from llmjax.sweep import study; from tests.sweep.test_study import make_plan; "
        f"study.run_trials(make_plan(trials=2, pause=60), epath.Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment())
    folder = study.trial_folder(epath.Path(tmp_path), 0)
    deadline = time.monotonic() + 120
    while not (folder / "eval" / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int(subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)]).split()[0])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    os.kill(child, signal.SIGKILL)
    plan = make_plan(trials=2)
    assert study.list_results(plan, epath.Path(tmp_path))[0].state == "running"
    assert study.run_trials(plan, epath.Path(tmp_path)) == 0
    trials = study.list_results(plan, epath.Path(tmp_path))
    assert [trial.state for trial in trials] == ["complete", "complete"]
    assert (folder / "starts").read_text().count("start") == 2


def test_seconds_are_those_of_all_starts_of_a_run(tmp_path):
    """A start that was killed counts to its last logged step, and a run that was killed before one has no seconds."""
    root = epath.Path(tmp_path)
    assert training.read_seconds(root) is None
    starts = [{"time": 1000.0, "seconds": 50.0}, {"time": 2000.0}]
    (root / "run.json").write_text(json.dumps({"starts": starts[1:]}))
    assert training.read_seconds(root) is None
    (root / "run.json").write_text(json.dumps({"starts": starts}))
    assert training.read_seconds(root) == 50
    (root / "metrics.jsonl").write_text(json.dumps({"step": 8, "time": 2007.0}) + "\n")
    assert training.read_seconds(root) == 57


def test_a_trial_of_a_live_process_is_left_to_it(tmp_path):
    root, plan = epath.Path(tmp_path), make_plan(trials=1)
    opened = study.open_study(plan, root)
    opened.ask()
    folder = study.trial_folder(root, 0)
    folder.mkdir(parents=True)
    with workdirs.Lock(folder, primary=True, name="worker.lock.json"):
        assert study.run_trials(plan, root) == 0
    assert study.list_results(plan, root)[0].state == "running"
    assert not (folder / "starts").exists()


def test_scores_of_tasks_are_read_and_an_unknown_metric_is_named(tmp_path):
    root = epath.Path(tmp_path)
    (root / "eval" / "20").mkdir(parents=True)
    (root / "eval" / "20" / "topics.json").write_text(json.dumps({"metrics": {"acc": {"value": 0.7}}}))
    (root / "eval" / "20" / "validation.json").write_text(json.dumps({"total": {"loss": 2.0}}))
    assert training.read_scores(root, "topics/acc") == {20: 0.7}
    assert training.read_scores(root, "loss") == {20: 2.0}
    with pytest.raises(UserError, match="has loss; choose one of these"):
        training.read_scores(root, "accuracy")


def test_the_best_evaluation_counts_where_its_checkpoint_is_kept():
    scores = {10: 0.4, 20: 0.9, 30: 0.7}
    assert training.find_score(scores, "topics/acc", keeps_best=False) == 0.7
    assert training.find_score(scores, "topics/acc", keeps_best=True) == 0.9
    assert training.find_score(scores, "loss", keeps_best=True) == 0.4


def test_two_workers_share_the_trials(tmp_path):
    """Each trial is trained once, whichever worker asks for it."""
    plan = make_plan(trials=5, pause=0.05)
    with concurrent.futures.ThreadPoolExecutor(2) as workers:
        assert list(workers.map(study.run_trials, [plan, plan], [epath.Path(tmp_path)] * 2)) == [0, 0]
    trials = study.list_results(plan, epath.Path(tmp_path))
    assert [trial.state for trial in trials] == ["complete"] * 5
    assert len({tuple(trial.overrides) for trial in trials}) == 5
    starts = [(study.trial_folder(epath.Path(tmp_path), n) / "starts").read_text() for n in range(5)]
    assert starts == ["start\n"] * 5


def test_a_run_that_is_stopped_from_outside_is_left_to_be_resumed(tmp_path):
    """As where a cloud takes the machine away: status 85, the sweep ends with it."""
    stopped = dataclasses.replace(
        make_plan(trials=2), command=lambda *_: [sys.executable, "-c", "raise SystemExit(85)"]
    )
    assert study.run_trials(stopped, epath.Path(tmp_path)) == 85
    assert [trial.state for trial in study.list_results(stopped, epath.Path(tmp_path))] == ["running"]
