"""`llmjax analyse` on scored tasks: without a model, with a run's token store and states, and its bad input."""

import json

from etils import epath
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from llmjax.analysis import task_examples, train_texts
from llmjax.cli import main
from llmjax.cli.analyse import analyse as analyse_command
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig
from llmjax.parallel import axes
from llmjax.run import config as run_config, loading, workdir as workdirs
from tests import jobs
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


def make_reviews(count: int, seed: int) -> list[dict[str, str]]:
    """Reviews whose words say their class."""
    words = {
        "bad": ["awful", "dull", "tedious"],
        "fair": ["plain", "usual", "mild"],
        "good": ["superb", "moving", "fine"],
    }
    rng, records = np.random.default_rng(seed), []
    for number in range(count):
        label = CLASSES[number % 3]
        text = f"the film number {seed}{number} was {rng.choice(words[label])} and {rng.choice(words[label])}"
        records.append({"text": text, "label": label})
    return records


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the workdir of a classifier that was trained here and scored on a task, its training records).

    The first example of the task is one of them.
    """
    folder = tmp_path_factory.mktemp("trained")
    learned, examples = make_reviews(60, 1), make_reviews(45, 2)
    examples[0] = learned[30]
    workdir, path = folder / "run", write_records(folder / "train.jsonl", learned)
    settings = {
        **jobs.ONE_LAYER,
        "data.seq_len": 64,
        "data.sources.main.path": path,
        "data.sources.main.split": "train",
        "data.classes": CLASSES,
        "model.mlp": 32,
        "optimizer.warmup_steps": 1,
        "train.steps": 4,
        "train.global_batch": 8,
        "eval.tasks.mine.kind": "classify",
        "eval.tasks.mine.path": write_records(folder / "reviews.jsonl", examples),
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    assert main.run(["train", "--config=classify", f"--workdir={workdir}", *flags]) == 0
    assert main.run(["eval", f"--workdir={workdir}", "--tasks=mine"]) == 0
    return epath.Path(workdir), learned


def test_texts_and_labels_of_the_token_store(trained, monkeypatch):
    workdir, learned = trained
    config, scored = loading.read_config(workdir), task_examples.read(workdir, "mine")
    read = train_texts.read_store(workdir, config, scored)
    assert not isinstance(read, str) and read.labels is not None and read.total == 60
    records = {(text, CLASSES[label]) for text, label in zip(read.texts, read.labels, strict=True)}
    assert records == {(record["text"], record["label"]) for record in learned}
    assert read.test == list(scored.texts) and read.origin == str(workdir / "store")
    monkeypatch.setattr(train_texts, "MAX_TEXTS", 20)
    some = train_texts.read_store(workdir, config, scored)
    assert not isinstance(some, str) and some.labels is not None and some.total == 60
    assert {(t, CLASSES[label]) for t, label in zip(some.texts, some.labels, strict=True)} < records
    assert len(some.texts) == 20


def test_a_store_that_does_not_compare_with_the_task_says_why(trained):
    workdir, _ = trained
    scored = task_examples.read(workdir, "mine")
    reason = train_texts.read_store(workdir, make_loaded("causal").config, scored)
    assert reason == "the run was trained on text, and kind='classify' asks questions about it"


@pytest.mark.parametrize("other", [False, True])
def test_vectors_of_a_run_and_its_training_texts(trained, other):
    """The digits by which the texts of the two files differ show in states. Those of the run itself are not compared,
    since it was trained on one of the files; --vectors names a run that was not, as far as the command knows."""
    workdir, _ = trained
    flags = [f"--vectors={workdir}"] if other else []
    assert analyse_command([f"--workdir={workdir}", "--task=mine", *flags]) == 0
    content = json.loads((workdir / "analysis.json").read_text())
    assert content["vectors"] == (f"the states of {workdir}" if other else "the run's own states")
    assert content["train_origin"] == str(workdir / "store") and content["train_total"] == 60
    assert [(copy["index"], copy["similarity"]) for copy in content["near_copies"]] == [(0, 1.0)]
    assert content["next_steps"][0]["reason"].startswith("1 example (2.2%) is a near-duplicate of training texts. The")
    assert content["learning_curve"]["num_test"] == 45 and content["learning_curve"]["sizes"][-1] == 60
    assert content["label_errors"] is not None and "learning_curve_train" not in content["missing"]
    assert content["mismatch"]["alarm"] is other


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
