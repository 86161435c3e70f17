"""Suggested commands are valid for a shell, and work in the workdir for which they are suggested."""

from llmjax.run import next_commands


def test_the_command_fits_the_objective_and_is_quoted():
    generate = next_commands.use_model("my runs/a", "causal", "it's")
    assert generate == """llmjax generate --workdir='my runs/a' --prompt='it'"'"'s'"""
    assert next_commands.use_model("runs/a", "masked") == "llmjax fill --workdir=runs/a --text='The [MASK] of the'"


def test_eval_is_suggested_only_with_a_token_store(tmp_path):
    train = "llmjax train --workdir=runs/a --config.data.sources.main.path='/my/texts/**/*.txt'"
    assert next_commands.score_model("runs/a", None) == train
    assert next_commands.score_model("runs/a", tmp_path) == train
    (tmp_path / "manifest.json").touch()
    assert next_commands.score_model("runs/a", tmp_path) == "llmjax eval --workdir=runs/a --split=test"


def test_a_model_without_a_head_embeds():
    assert (
        next_commands.embed_texts("runs/a") == "llmjax embed --workdir=runs/a --input=texts.jsonl --output=vectors.npy"
    )
