"""`llmjax compare` on runs that were trained and scored here."""

import json

from llmjax.cli.compare import compare as compare_command
from llmjax.cli.train import train as train_command
from tests import jobs
from tests.report.runs import PageParser, check_svgs

SETTINGS = {
    **jobs.ONE_LAYER,
    "data.seq_len": 64,
    "optimizer.warmup_steps": 1,
    "train.log_every": 2,
    "train.global_batch": 8,
    "checkpoint.every": 100,
    "sample.prompts": "()",
    "eval.every": 4,
    "eval.tasks.lines.kind": "perplexity",
    "eval.tasks.words.kind": "pairs",
    "eval.during_training": "('lines', 'words')",
}


def test_two_trained_runs(tmp_path, capsys):
    jobs.write_corpus(tmp_path / "corpus", 20)
    code = (jobs.ROOT / "llmjax" / "batch.py").read_text().splitlines()
    lines = [line for line in code if len(line) > 20][:40]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "words.csv").write_text("good,bad\nreturn,nruter\nimport,tropmi\nself,zqzx\n")
    settings = SETTINGS | {
        "data.sources.main.path": f"{tmp_path}/corpus/*.txt",
        "data.store": tmp_path / "store",
        "eval.tasks.lines.path": tmp_path / "lines.jsonl",
        "eval.tasks.words.path": tmp_path / "words.csv",
    }
    for name, steps in (("short", 4), ("long", 12)):
        flags = [f"--config.{field}={value}" for field, value in (settings | {"train.steps": steps}).items()]
        assert train_command(["--config=quickstart", *flags, f"--workdir={tmp_path / name}"]) == 0
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert compare_command([str(tmp_path / "short"), str(tmp_path / "long"), f"--output={page}"]) == 0
    printed = capsys.readouterr().out
    # Three times the steps on text like that of the task: every line takes fewer bits.
    assert "lines bits_per_byte: long - short = -" in printed and "better alone: short 0, long 40" in printed
    assert "(sign flips): significant" in printed and "words acc: " in printed
    cost = next(line.split() for line in printed.splitlines() if "model FLOPs" in line)
    short, long = map(float, cost[-2:])
    assert 2.9 < long / short < 3.1
    assert next(line.split() for line in printed.splitlines() if "train.steps" in line) == ["train.steps", "4", "12"]
    text = page.read_text()
    assert "long is better than short" in PageParser(text).text and check_svgs(text) >= 4
