"""`llmjax analyse` on a scored task, without a model, and its bad input."""

import json

import pytest
from threadpoolctl import threadpool_limits

from llmjax.cli.analyse import analyse as analyse_command
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig
from llmjax.parallel import axes
from llmjax.run import config as run_config, workdir as workdirs
from tests.evals.tasks.models import CLASSES, evaluate, make_loaded, write_records
from tests.serve import runs
from tests.train.trainer import one_device


@pytest.fixture
def workdir(tmp_path):
    """The results of a task with 30 examples, the config of the run, and no checkpoint."""
    loaded = make_loaded("classify")
    workdirs.write_json(tmp_path / workdirs.CONFIG, run_config.to_json(loaded.config))
    records = [
        {"text": f"the film is {word} {word} number {number}", "label": CLASSES[number % 3]}
        for number, word in enumerate(("dull", "usual", "superb") * 10)
    ]
    task = TaskConfig(kind="classify", path=write_records(tmp_path / "reviews.jsonl", records))
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules), threadpool_limits(1):
        evaluate(tmp_path, loaded, task)
        yield tmp_path


def test_files_and_suggested_labels(workdir, capsys):
    flags = [f"--workdir={workdir}", "--task=mine", "--vectors=tfidf"]
    original = (workdir / "reviews.jsonl").read_bytes()
    assert analyse_command([*flags, f"--train={workdir / 'reviews.jsonl'}", "--fix"]) == 0
    content = json.loads((workdir / "analysis.json").read_text())
    assert content["task"] == "mine" and content["count"] == 30 and len(content["near_copies"]) == 30
    assert "What to do next" in (workdir / "analysis.html").read_text()
    suggested = workdir / "mine.suggested.jsonl"
    assert len(suggested.read_text().splitlines()) == 30
    assert (workdir / "reviews.jsonl").read_bytes() == original
    # Neither an earlier file of suggestions nor the original is replaced.
    for fix in ("--fix", f"--fix={workdir / 'reviews.jsonl'}"):
        with pytest.raises(UserError, match=r"--fix=.*\.jsonl: already exists; give a new file"):
            analyse_command([*flags, fix])
    # Without a token store and --train, the parts that need training texts say why they are missing.
    assert analyse_command(flags) == 0
    content = json.loads((workdir / "analysis.json").read_text())
    assert content["mismatch"] is None and "there is no token store" in content["missing"]["mismatch"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=other"], r"--task=other: .* has no results of this task \(it has: mine\)"),
        (["--task=mine", "--fix=a.csv"], r"--fix=a.csv: give a new file whose name ends in .jsonl"),
        (["--task=mine", "--fix=absent/a.jsonl"], r"--fix=absent/a.jsonl: there is no folder absent"),
        (["--task=mine", "--train=absent.jsonl", "--vectors=tfidf"], r"absent.jsonl"),
        ([], r"--task"),
    ],
)
def test_bad_input(workdir, flags, message):
    with pytest.raises(UserError, match=message):
        analyse_command([f"--workdir={workdir}", *flags])
