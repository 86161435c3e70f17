"""The ladder of `llmjax size --reduce`: its models, and which of them it trains and chooses."""

import json
import sys

import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.plan import reduce
from llmjax.run import config as run_config
from llmjax.sweep import training
from tests import jobs

# Training in another program's place: the loss rises with each of the smaller models.
FAKE = """
import json, pathlib, sys
folder, loss = pathlib.Path(sys.argv[1]), float(sys.argv[2])
(folder / "eval" / "9").mkdir(parents=True)
(folder / "eval" / "9" / "validation.json").write_text(json.dumps({"total": {"loss": loss}}))
"""


def test_each_rung_has_about_half_the_weights_of_the_blocks():
    """The quickstart's heads have 32 dimensions: 6 heads of 32 and 4 layers by the cube roots of 2 are 5 and 3, ..."""
    rungs = reduce.make_ladder(run_config.with_vocabulary(run_config.resolve("quickstart", []), 1000), 3)
    assert [rung.name for rung in rungs] == ["4x192", "3x160", "3x128", "2x96"]
    assert rungs[0].overrides == ()
    assert dict(rungs[1].overrides) == {
        "model.embed": "160",
        "model.num_heads": "5",
        "model.mlp": "424",
        "model.num_layers": "3",
    }
    assert sorted((rung.parameters for rung in rungs), reverse=True) == [rung.parameters for rung in rungs]


def test_query_groups_stay_valid():
    resolved = run_config.with_vocabulary(run_config.resolve("llama:tiny", []), 1000)
    for rung in reduce.make_ladder(resolved, 4)[1:]:
        fields = dict(rung.overrides)
        assert int(fields["model.num_heads"]) % int(fields["model.num_kv_heads"]) == 0


def test_a_family_without_heads_is_refused():
    resolved = run_config.with_vocabulary(run_config.resolve("recurrent:lstm", []), 1000)
    with pytest.raises(UserError, match="no attention heads"):
        reduce.make_ladder(resolved, 3)


def test_the_ladder_ends_where_the_loss_rises_and_is_resumed(tmp_path, monkeypatch, capsys):
    """Losses 2, 2.01, 2.5: the second model is chosen, the fourth is not trained, a second start trains nothing."""
    corpus, losses, started = jobs.write_corpus(tmp_path / "corpus", 20), iter([2.0, 2.01, 2.5]), []

    def command(spec, folder, overrides):
        started.append(dict(overrides).get("model.num_heads", "6"))
        return [sys.executable, "-c", FAKE, str(folder), str(next(losses))]

    monkeypatch.setattr(training, "command", command)
    monkeypatch.setattr(training, "_POLL_SECONDS", 0.02)
    workdir = tmp_path / "ladder"
    words = ["size", "--reduce", "--config=quickstart", f"--workdir={workdir}", "--max_loss_increase=0.05"]
    words += [f"--config.data.sources.main.path={corpus}/*.txt", "--config.data.tokenizer.kind=bytes"]
    words += ["--config.data.split.near_copies=False", "--config.data.workers=1"]
    for _ in range(2):
        assert main.run(words) == 0
        printed = capsys.readouterr().out
        assert "  --config.model.embed=160 --config.model.num_heads=5" in printed
        assert f"next:   llmjax eval --workdir={workdir}/rungs/3x160 --split=test" in printed
        head, *rows = (line for line in printed.splitlines() if line.startswith(("layers x width", "4x", "3x")))
        assert [row.split()[0] for row in rows] == ["4x192", "3x160", "3x128", "3x160:"]
        assert [row[head.index("loss") :][:6] for row in rows[:3]] == ["2.0000", "2.0100", "2.5000"]
        assert [row.endswith("<- smallest within") for row in rows] == [False, True, False, False]
        assert started == ["6", "5", "4"]
    record = json.loads((workdir / "reduce.json").read_text())
    assert [rung["loss"] for rung in record["rungs"]] == [2.0, 2.01, 2.5]
    with pytest.raises(UserError, match="another config"):
        main.run([*words, "--config.train.steps=7"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reduce", "--workdir=x"], "--config is missing"),
        (["--reduce", "--config=quickstart"], "--workdir is missing"),
        (["--reduce", "--config=quickstart", "--workdir=x", "--flops=1e9"], "--flops has no meaning"),
        (["--reduce", "--config=quickstart", "--workdir=x", "--max_loss_increase=-1"], "must not be negative"),
        (["--reduce", "--config=quickstart", "--workdir=x", "--config.train.epochs=2"], "same tokens"),
        (["--workdir=x", "--flops=1e9"], "only --reduce trains"),
    ],
)
def test_bad_input_is_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main.run(["size", *words])
