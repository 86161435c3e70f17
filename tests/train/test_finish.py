"""The scores and samples at the end of a run belong to its parameters and its settings."""

import json
import pathlib

import pytest

from tests import jobs

pytestmark = pytest.mark.slow


def read_scores(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "eval" / "2" / "validation.json").read_text())


def test_scores_and_samples_are_reused_only_for_the_same_settings(tmp_path):
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus"), tmp_path / "run"
    settings = {"train__steps": 2, "sample__prompts": "('import',)", "sample__max_tokens": 5, "train__profile": "(2,1)"}
    train = jobs.command("train", workdir, corpus, **settings)
    assert "profile of steps 2 to 2: " in jobs.run(train)
    assert "<h2>Profile</h2>" in (workdir / "report.html").read_text()
    first, written = read_scores(workdir), (workdir / "eval" / "2" / "validation.json").stat().st_mtime_ns
    jobs.run(train)
    assert (workdir / "eval" / "2" / "validation.json").stat().st_mtime_ns == written, "a second start reads the scores"

    jobs.run([*jobs.command("eval", workdir), "--config.data.seq_len=16"])
    assert read_scores(workdir)["total"]["loss"] != first["total"]["loss"]
    printed = jobs.run(train)
    assert "evaluating the validation split" in printed and read_scores(workdir) == first

    (sample,) = json.loads((workdir / "samples.json").read_text())
    jobs.run([*train, "--config.sample.temperature=0", "--config.sample.max_tokens=3"])
    (other,) = json.loads((workdir / "samples.json").read_text())
    assert (sample["temperature"], sample["max_tokens"]) == (0.8, 5)
    assert (other["temperature"], other["max_tokens"]) == (0, 3) and other["text"] != sample["text"]
