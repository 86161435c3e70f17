"""Tasks are scored during training as `llmjax eval --tasks` scores them, and decide which checkpoint is the best."""

import json

import pytest

from llmjax.cli.evaluate import evaluate as evaluate_command
from llmjax.cli.train import train as train_command
from llmjax.errors import UserError
from llmjax.evals.requests import LanguageModel
from tests import jobs

SETTINGS = {
    **jobs.ONE_LAYER,
    "data.seq_len": 64,
    "train.steps": 12,
    "train.global_batch": 8,
    "train.log_every": 4,
    "checkpoint.every": 100,
    "checkpoint.keep_best": "true",
    "sample.prompts": "()",
    "eval.every": 4,
    "eval.tasks.lines.kind": "perplexity",
    "eval.tasks.words.kind": "pairs",
    "eval.during_training": "('lines', 'words')",
    "eval.metric": "words/acc",
}


def flags(folder, **changes) -> list[str]:
    jobs.write_corpus(folder / "corpus", 20)
    lines = ["def main(self):", "    return None", "import numpy as np"]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "words.csv").write_text("good,bad\nreturn,nruter\nimport,tropmi\nself,zqzx\n")
    settings = SETTINGS | {f"eval.tasks.{name}.path": folder / f"{name}.{end}" for name, end in TASK_FILES.items()}
    settings["data.sources.main.path"] = f"{folder}/corpus/*.txt"
    return ["--config=quickstart", *(f"--config.{name}={value}" for name, value in (settings | changes).items())]


TASK_FILES = {"lines": "jsonl", "words": "csv"}


def read_scores(workdir) -> dict[str, dict[int, dict]]:
    read = lambda step, name: json.loads((workdir / "eval" / str(step) / f"{name}.json").read_text())
    return {name: {step: read(step, name)["metrics"] for step in (4, 8, 12)} for name in TASK_FILES}


def test_tasks_during_training(tmp_path, monkeypatch, caplog):
    workdir = tmp_path / "run"
    compiled = []
    score_batch = LanguageModel._score_batch

    def count_compilations(model, params, batch, **static):
        compiled.append((batch.inputs.shape, *static.values()))
        return score_batch(model, params, batch, **static)

    monkeypatch.setattr(LanguageModel, "_score_batch", count_compilations)
    assert train_command([*flags(tmp_path), f"--workdir={workdir}"]) == 0
    assert len(compiled) == len(set(compiled)), "a program was compiled again for the parameters of a later step"
    scores = read_scores(workdir)
    nats = [by_step["bits_per_byte"]["value"] for by_step in scores["lines"].values()]
    assert nats[0] > nats[1] > nats[2]  # of text like that it is trained on
    # The best of the steps that were scored before the last one has a checkpoint, besides the last step.
    accuracy = {step: scores["words"][step]["acc"]["value"] for step in (4, 8)}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()} >= {str(best), "12"}
    report = (workdir / "report.html").read_text()
    assert "<h2>Tasks</h2>" in report and "lines: bits_per_byte" in report
    # The same command finds nothing to train, and reads these results.
    compiled.clear()
    assert train_command([f"--workdir={workdir}"]) == 0 and not compiled
    # So does `llmjax eval`, which computes them again only where they are missing.
    (workdir / "eval" / "12" / "lines.json").unlink()
    monkeypatch.setattr(LanguageModel, "_score_batch", score_batch)
    caplog.set_level("INFO")
    caplog.clear()  # training has said that it reads them, if an earlier test made the logger say so
    assert evaluate_command([f"--workdir={workdir}", "--tasks=lines,words"]) == 0
    assert "words: scored before" in caplog.text and "lines: scored before" not in caplog.text
    for metric, number in read_scores(workdir)["lines"][12].items():
        assert number["value"] == pytest.approx(scores["lines"][12][metric]["value"], rel=1e-5)


# Generation has no rounding to hide behind: a text that differs in one token is another text.
WAYS = {
    "jit": {},
    "pmap": {"parallel.backend": "pmap"},
    "fixed_tree": {"parallel.reduction": "fixed_tree", "parallel.virtual_shards": 8},
}


def test_tasks_have_the_same_scores_however_the_step_is_computed(tmp_path):
    """On 8 devices. Sums in another order move a loss by some roundings."""
    results = {}
    for way, changes in WAYS.items():
        workdir = tmp_path / way
        generate = {"kind": "generate", "text_field": "text", "answer_field": "text", "max_tokens": 8}
        changes |= {f"eval.tasks.code.{name}": value for name, value in generate.items()}
        changes |= {"eval.tasks.code.path": tmp_path / "lines.jsonl", "train.steps": 2, "eval.every": 2}
        changes |= {"optimizer.warmup_steps": 1}
        changes |= {"eval.during_training": "('lines', 'words', 'code')", "checkpoint.keep_best": "false"}
        assert train_command([*flags(tmp_path, **changes), f"--workdir={workdir}"]) == 0
        files = {name: workdir / "eval" / "2" / f"{name}.json" for name in ("lines", "words", "code")}
        scores = {name: json.loads(path.read_text())["metrics"] for name, path in files.items()}
        lines = [json.loads(line) for line in files["code"].with_suffix(".jsonl").read_text().splitlines()]
        results[way] = (
            {
                f"{name}/{metric}": number[bound]
                for name, metrics in scores.items()
                for metric, number in metrics.items()
                for bound in ("value", "low", "high")
            },
            [line["prediction"] for line in lines],
        )
    scores, texts = results["jit"]
    assert len(texts) == 3 and any(texts)
    for other, other_texts in results.values():
        assert other == pytest.approx(scores, rel=1e-5) and other_texts == texts


def test_a_chat_without_a_template_is_refused_before_training(tmp_path):
    changes = {"eval.tasks.words.kind": "generate", "eval.tasks.words.chat": "True", "eval.metric": "loss"}
    changes |= {"eval.tasks.words.text_field": "good", "eval.tasks.words.answer_field": "bad"}
    with pytest.raises(UserError, match="it has no chat template"):
        train_command([*flags(tmp_path, **changes), f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.during_training": "('lnes',)"}, r"task 'lnes' \(did you mean 'lines'\?\): the config has no such task"),
        ({"eval.metric": "word/acc"}, r"eval\.metric='word/acc': .* not name the task 'word' \(did you mean 'words'"),
        (
            {"eval.metric": "words/ac"},
            r"eval\.metric='words/ac' \(did you mean 'acc'\?\): the scores of a task of kind='p",
        ),
        ({"eval.metric": "lines/acc/she"}, r"kind='perplexity' are bits_per_byte, perplexity; choose one"),
        ({"eval.tasks.words.good_field": "better"}, r"words\.csv has no column 'better'"),
    ],
)
def test_bad_tasks_are_refused_before_training(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_command([*flags(tmp_path, **changes), f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
