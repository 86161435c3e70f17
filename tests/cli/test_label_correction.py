"""From a classifier on wrong labels to a better one by commands alone, as at the start of docs/evaluate.md."""

import json

import numpy as np

from llmjax.cli.analyse import analyse as analyse_command
from llmjax.cli.compare import compare as compare_command
from llmjax.cli.evaluate import evaluate as eval_command
from llmjax.cli.train import train as train_command
from tests import jobs
from tests.report.runs import PageParser

WORDS = {"0": "awful dull tedious bland", "1": "superb moving brilliant fresh"}
FILLERS = ["the", "film", "of", "a", "was", "by"]
SETTINGS = {
    **jobs.ONE_LAYER,
    "data.classes": "('0', '1')",
    "data.seq_len": 64,
    "train.steps": 30,
    "train.global_batch": 16,
    "optimizer.learning_rate": 0.01,
    "sample.prompts": "()",
}


def make_lines(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) of reviews whose words say their class."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        label = "01"[number % 2]
        words = [*rng.choice(WORDS[label].split(), 2), *rng.choice(FILLERS, 2), f"n{number}"]
        lines.append((" ".join(rng.permutation(words)), label))
    return lines


def write_lines(path, lines) -> None:
    path.write_text("".join(f"{text}\t{label}\n" for text, label in lines))


def set_fields(prefix: str, fields) -> list[str]:
    return [f"--config.{prefix}{field}={value}" for field, value in fields.items()]


def train(workdir, source) -> None:
    settings = SETTINGS | {"data.store": workdir / "store"}
    assert (
        train_command(
            [
                "--config=classify",
                f"--workdir={workdir}",
                *set_fields("", settings),
                *set_fields("data.sources.main.", source),
            ]
        )
        == 0
    )


def score(workdir, name: str, path) -> None:
    fields = {"kind": "classify", "path": path, "columns": "('text', 'label')"}
    assert eval_command([f"--workdir={workdir}", f"--tasks={name}", *set_fields(f"eval.tasks.{name}.", fields)]) == 0


def test_flipped_labels_are_found_corrected_and_compared(tmp_path, capsys):
    true = make_lines(240, 0)
    planted = set(range(0, 240, 5))
    noisy = [(text, "10"[int(label)] if at in planted else label) for at, (text, label) in enumerate(true)]
    write_lines(tmp_path / "noisy.tsv", noisy)
    write_lines(tmp_path / "test.tsv", make_lines(100, 1))
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, {"path": tmp_path / "noisy.tsv", "columns": "('text', 'label')"})
    score(first, "reviews", tmp_path / "test.tsv")
    score(first, "labels", tmp_path / "noisy.tsv")

    assert analyse_command([f"--workdir={first}", "--task=labels", "--vectors=tfidf", "--fix"]) == 0
    analysis = json.loads((first / "analysis.json").read_text())
    steps = [step["evidence"] for step in analysis["next_steps"]]
    assert steps == ["near_copies", "label_errors"], "of the training set, only the labels are of use"
    assert "many of them are training texts" in analysis["missing"]["learning_curve_train"]

    records = [json.loads(line) for line in (first / "labels.suggested.jsonl").read_text().splitlines()]
    for record in records:
        record["label"] = record.get("suggested_label", record["label"])
    assert [record["text"] for record in records] == [text for text, _ in true]
    wrong = {at for at, record in enumerate(records) if record["label"] != true[at][1]}
    assert len(planted - wrong) >= 0.9 * len(planted) and len(wrong - planted) <= 3
    (tmp_path / "reviewed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    train(second, {"path": tmp_path / "reviewed.jsonl"})
    score(second, "reviews", tmp_path / "test.tsv")
    capsys.readouterr()
    page = tmp_path / "compare.html"
    assert compare_command([str(first), str(second), f"--output={page}"]) == 0
    printed = capsys.readouterr().out
    assert "reviews accuracy: second - first = " in printed and "(exact McNemar)" in printed
    assert "right alone: first " in printed
    assert "only second right" in PageParser(page.read_text()).text
