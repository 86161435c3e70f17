"""`llmjax sweep` with real runs, and its bad input."""

import json
import sys

import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from tests import jobs
from tests.interop import published

SETTINGS = {
    **jobs.ONE_LAYER,
    "data.seq_len": 32,
    "train.steps": 4,
    "train.global_batch": 4,
    "eval.every": 2,
    "optimizer.warmup_steps": 1,
}
SETTINGS |= {"model.mlp": 32, "train.log_every": 2, "sample.prompts": "()", "optimizer.warmup_steps": 1}
OVER = "--over=optimizer.learning_rate=choice(1e-6,0.01)"


def arguments(workdir, corpus=None, *more):
    fields = SETTINGS if corpus is None else {**SETTINGS, "data.sources.main.path": f"{corpus}/*.txt"}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["sweep", "--config=quickstart", f"--workdir={workdir}", *more, *overrides]


def test_a_sweep_trains_each_trial_and_prints_the_winner(tmp_path, capsys):
    """Two learning rates: one learns, the other does not; `--workdir` alone shows the result again."""
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus", 20), tmp_path / "sweep"
    assert main.run(arguments(workdir, corpus, OVER, "--sampler=grid", "--trials=5")) == 0
    printed = capsys.readouterr().out
    assert "--config.optimizer.learning_rate=0.01\n" in printed
    assert f"next:   llmjax eval --workdir={workdir}/trials/001 --split=test" in printed
    page = (workdir / "sweep.html").read_text()
    assert page.count("<circle") >= 2 and "optimizer.learning_rate (choice)" in page and "http" not in page
    config = json.loads((workdir / "trials" / "001" / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 0.01
    assert config["data"]["store"] == str(workdir / "store"), "trials share the store"
    assert sorted(path.name for path in (workdir / "trials" / "000" / "eval").iterdir()) == ["2", "4"]
    seconds = json.loads((workdir / "trials" / "000" / "run.json").read_text())["starts"][0]["seconds"]
    assert next(line for line in printed.splitlines() if line.startswith("0 ")).split()[-1] == f"{seconds:.0f}"

    assert main.run(["sweep", f"--workdir={workdir}"]) == 0
    assert "trial 1, as overrides" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--seed: 4, but the sweep in .* has 0"):
        main.run(["sweep", f"--workdir={workdir}", "--seed=4"])


def test_trials_start_from_imported_parameters(tmp_path, capsys):
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus", 20), tmp_path / "sweep"
    source = published.write_folder(
        tmp_path / "hf", published.LLAMA, published.random_tensors(published.llama_shapes())
    )
    assert main.run(["import", f"--from={source}", f"--workdir={workdir}"]) == 0
    words = [word for word in arguments(workdir, corpus, OVER, "--sampler=grid") if "config.model." not in word]
    words.remove("--config.data.tokenizer.kind=bytes")
    with pytest.raises(UserError, match=r"--over=model.mlp: the imported parameters decide it"):
        main.run([word.replace(OVER, "--over=model.mlp=choice(32,64)") for word in words])
    assert main.run(words) == 0
    assert "--config.optimizer.learning_rate=0.01\n" in capsys.readouterr().out
    for number in (0, 1):
        trial = workdir / "trials" / f"{number:03d}"
        assert f"starting from the parameters that were imported from {source}" in (trial / "train.log").read_text()
        config = json.loads((trial / "config.json").read_text())
        assert config["model"]["embed"] == published.LLAMA["hidden_size"]
        assert (trial / "tokenizer" / "tokenizer.json").exists()
        assert config["data"]["store"] == str(workdir / "store"), "trials share the store"
    assert main.run(["sweep", f"--workdir={workdir}"]) == 0

    (workdir / "run.json").write_text("{}")
    with pytest.raises(UserError, match="contains a training run"):
        main.run(["sweep", f"--workdir={workdir}"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--over is missing"),
        (["--over=optimizer.learning_rat=log(1e-4,1e-2)"], "did you mean 'learning_rate'"),
        (["--over=train.steps=int(2,4)"], "both set train.steps"),
        (["--over=optimizer.learning_rate=log(1e-4,1e-2)", "--sampler=grid"], "a grid needs values"),
        (["--over=model.dropout=uniform(0,0.1)", "--prune=median", "--config.eval.every=0"], "eval.every=0"),
        (["--over=optimizer.decay_fraction=choice(0.5,0.9)"], "don't fit in the"),
        (["--over=model.dropout=uniform(0,0.1)", "--trials=0"], "--trials=0"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(more, words, tmp_path):
    with pytest.raises(UserError, match=words):
        overrides = [word for word in more if word.startswith("--config.")]
        flags = [word for word in more if not word.startswith("--config.")]
        main.run([*arguments(tmp_path / "sweep", None, *flags), *overrides])
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_a_run_is_no_sweep(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="contains a training run"):
        main.run(arguments(tmp_path, None, OVER))


def test_a_missing_optuna_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'llmjax\[sweep\]'"):
        main.run(arguments(tmp_path / "sweep", None, OVER))
