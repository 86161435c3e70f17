"""Preferences as batches: two sequences a row, of which the answers are targets, with their reference values."""

import json

import numpy as np
import pytest

from llmjax.data.batches.pipeline import EvalData, TrainData
from llmjax.data.config import DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.objectives.objective import open_objective
from llmjax.data.store.tokenizer_kinds import Bytes
from tests.data.preparation import BYTES, run_prepare

TOKENIZER = Bytes()
BOS, EOS, SEQ_LEN = TOKENIZER.bos_id, TOKENIZER.eos_id, 40
OBJECTIVE = open_objective(ObjectiveConfig(name="dpo"), TOKENIZER, seq_len=SEQ_LEN, one_segment=True)
RECORDS = [("p" * (n % 5 + 1), "c" * (n % 4 + 1), "r" * (n % 3 + 1)) for n in range(14)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(folder, config)"""
    root = tmp_path_factory.mktemp("preferences")
    names = ("prompt", "chosen", "rejected")
    lines = [json.dumps(dict(zip(names, record, strict=True))) + "\n" for record in RECORDS]
    (root / "a.jsonl").write_text("".join(lines))
    source = SourceConfig(
        path=str(root / "a.jsonl"),
        text_field="prompt",
        chosen_field="chosen",
        rejected_field="rejected",
        split="train",
    )
    config = DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, seq_len=SEQ_LEN, packing="none")
    run_prepare(config, root / "store")
    return root / "store", config


def eval_batches(store, batch: int, reference=None):
    folder, config = store
    data = EvalData(folder, config, split="train", source="main", batch=batch, objective=OBJECTIVE, reference=reference)
    return list(data.batches(np.arange(batch)))


def test_the_answers_are_targets(store):
    seen = []
    for batch in eval_batches(store, 7):
        assert batch.num_texts == 2 and not batch.one_segment
        for row in range(7):
            texts = []
            for number in (1, 2):
                inside = batch.segments[row] == number
                ids, scored = batch.inputs[row][inside].tolist(), batch.weights[row][inside] > 0
                targets = batch.targets[row][inside]
                assert ids[0] == BOS and targets[:-1].tolist() == ids[1:] and not scored[-1]
                assert batch.positions[row][inside].tolist() == list(range(len(ids)))
                answer = targets[scored].tolist()
                assert answer[-1] == EOS and ids[-len(answer) :] == answer
                texts.append((TOKENIZER.decode(ids[1 : len(ids) - len(answer)]), TOKENIZER.decode(answer[:-1])))
            assert texts[0][0] == texts[1][0]
            seen.append((texts[0][0], texts[0][1], texts[1][1]))
    assert seen == RECORDS


def test_rows_without_a_record_are_padding(store):
    last = eval_batches(store, 4)[-1]
    assert last.weights[1].any() and not last.weights[2:].any() and not last.segments[2:].any()


def test_each_row_has_its_own_reference(store):
    folder, config = store
    reference = np.arange(28, dtype=np.float32).reshape(14, 2)
    batches = eval_batches(store, 4, reference)
    np.testing.assert_array_equal(np.concatenate([b.reference for b in batches])[:14], reference)
    data = TrainData(folder, config, seed=1, global_batch=14, objective=OBJECTIVE)
    data.add_reference({("main", "train"): reference})
    batch = next(data.batches(data.start(), np.arange))[0]
    for row in range(14):
        text = (
            TOKENIZER.decode(batch.inputs[row][batch.segments[row] == 1]),
            TOKENIZER.decode(batch.inputs[row][batch.segments[row] == 2]),
        )
        prompt, chosen, rejected = RECORDS[int(batch.reference[row, 0]) // 2]
        assert text == (prompt + chosen, prompt + rejected)
    data.close()
