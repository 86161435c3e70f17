"""Dialogues in rows: whole, apart from each other, cut only at the end of a turn, and mixed with plain text."""

import dataclasses
import json

import numpy as np
import pytest

from llmjax.data.batches.packing import open_packing
from llmjax.data.batches.pipeline import EvalData, TrainData
from llmjax.data.config import DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.objectives import preview
from llmjax.data.objectives.objective import open_objective
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import Bytes
from llmjax.errors import UserError
from llmjax.run.config import RunConfig
from tests.data.preparation import BYTES, run_prepare
from tests.data.stores import log_lines

SEQ_LEN = 160


def turns(*texts):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


# The default template writes BOS, then 9 characters and the text and a line break for a user's turn, 14 characters and
# the text and EOS and a line break for the assistant's.
SHORT = [turns(f"Why {number}?", f"Because {number}.") for number in range(30)]
CUT = turns("Q" * 20, "A" * 20, "Q" * 30, "B" * 20, "Q" * 30, "C" * 60)  # its first two answers fit 160 positions
LEFT_OUT = turns("Q" * 20, "D" * 200)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    paths = {}
    for split, dialogues in (("train", [*SHORT, CUT, LEFT_OUT]), ("validation", SHORT[:5])):
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues))
    (folder / "plain.jsonl").write_text("".join(json.dumps({"text": f"plain text {n}"}) + "\n" for n in range(40)))
    sources = {split: SourceConfig(path=str(path), chat="auto", split=split) for split, path in paths.items()}
    sources["plain"] = SourceConfig(path=str(folder / "plain.jsonl"), split="train")
    return DataConfig(sources=sources, tokenizer=BYTES, workers=1, seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def store(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues") / "store"
    run_prepare(config, folder)
    return folder


def train_data(store, config, *names):
    objective = open_objective(ObjectiveConfig(), Bytes(), seq_len=SEQ_LEN)
    chosen = dataclasses.replace(config, sources={name: config.sources[name] for name in names})
    return TrainData(store, chosen, seed=0, global_batch=4, objective=objective)


def read_segments(data, count):
    """(inputs, targets, scored targets) of every segment of `count` batches, as bytes; BOS and EOS are < and >."""
    show = lambda ids: bytes(np.where(ids == 256, ord("<"), np.where(ids == 257, ord(">"), ids)).tolist()).decode()
    segments = []
    batches = data.batches(data.start(), np.arange)
    for batch, _ in [next(batches) for _ in range(count)]:
        for row in range(4):
            for number in range(1, batch.segments[row].max() + 1):
                inside = batch.segments[row] == number
                targets, weights = batch.targets[row][inside], batch.weights[row][inside]
                assert batch.positions[row][inside].tolist() == list(range(inside.sum()))
                segments.append((show(batch.inputs[row][inside]), show(targets), show(targets[weights > 0])))
        assert not batch.weights[batch.segments == 0].any()
    data.close()
    return segments


def test_dialogues_are_apart_and_cut_at_the_end_of_a_turn(store, config):
    with log_lines() as lines:
        data = train_data(store, config, "train")
    assert any("1 were cut at the end of an assistant turn, 1 were left out" in line for line in lines)
    segments = read_segments(data, -(-data.rows // 4))
    by_answer = {scored: (inputs, targets) for inputs, targets, scored in segments}
    cut = "A" * 20 + ">" + "B" * 20 + ">"
    assert set(by_answer) == {cut, *(f"Because {number}.>" for number in range(30))}
    inputs, targets = by_answer["Because 7.>"]
    assert inputs == "<<|user|>\nWhy 7?\n<|assistant|>\nBecause 7." and targets == inputs[1:] + ">"
    inputs, targets = by_answer[cut]
    assert targets.endswith("B" * 20 + ">") and inputs.startswith("<<|user|>\nQ") and len(targets) <= SEQ_LEN
    summary = data.summary()["train"]
    assert summary["scored"] == sum(len(f"Because {number}.>") for number in range(30)) + len(cut)
    assert (summary["cut"], summary["left_out"]) == (1, 1)


def test_plain_text_beside_dialogues_is_scored_throughout(store, config):
    segments = read_segments(train_data(store, config, "train", "plain"), 8)
    plain = [segment for segment in segments if segment[1].startswith("plain")]
    assert plain and all(targets == scored and inputs[0] == "<" for inputs, targets, scored in plain)
    assert any(scored.startswith("Because") and len(scored) < len(targets) for _, targets, scored in segments)


def test_every_scored_target_is_evaluated_once(store, config):
    objective = open_objective(ObjectiveConfig(), Bytes(), seq_len=SEQ_LEN)
    data = EvalData(store, config, split="validation", source="validation", batch=4, objective=objective)
    scored = sum(float(batch.weights.sum()) for batch in data.batches(np.arange(4)))
    assert scored == data.scored == sum(len(f"Because {number}.>") for number in range(5)) < data.tokens


def test_the_preview_shows_what_is_scored(store, config):
    objective = open_objective(ObjectiveConfig(), Bytes(), seq_len=SEQ_LEN)
    data = EvalData(store, config, split="validation", source="validation", batch=2, objective=objective)
    lines = "\n".join(preview.format_batch(next(data.batches(np.arange(2))), objective, Bytes()))
    assert "(>) (\\n) B e c a u s e" in " ".join(lines.replace("targets", "").split())


@pytest.mark.parametrize("packing", ["concat", "stream"])
def test_windows_are_refused(store, packing, tmp_path):
    with pytest.raises(UserError, match=f"data.packing='{packing}': .* holds dialogues"):
        open_packing(TokenStore(store / "train" / "train"), SEQ_LEN, packing, tmp_path)
    with pytest.raises(UserError, match=f"data.packing='{packing}': data.sources.main.chat='auto' needs whole"):
        RunConfig(data=DataConfig(sources={"main": SourceConfig(chat="auto")}, packing=packing))


@pytest.mark.parametrize("objective", ["prefix", "fim"])
def test_other_objectives_are_refused(objective):
    with pytest.raises(UserError, match=f"objective.name='{objective}': data.sources.main.chat='auto' needs 'causal'"):
        RunConfig(
            data=DataConfig(sources={"main": SourceConfig(chat="auto")}), objective=ObjectiveConfig(name=objective)
        )


def test_rows_that_no_turn_fits_are_refused(store, config):
    objective = open_objective(ObjectiveConfig(), Bytes(), seq_len=16)
    short = dataclasses.replace(config, sources={"train": config.sources["train"]}, seq_len=16)
    with pytest.raises(UserError, match=r"data.seq_len=16: no assistant turn of data.sources.train fits a row; raise"):
        TrainData(store, short, seed=0, global_batch=4, objective=objective)
