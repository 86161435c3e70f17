"""Records of several texts: one record a row, each text framed as a segment of its own, the longest cut first."""

import json

import numpy as np
import pytest

from llmjax.data.batches.pipeline import EvalData, TrainData
from llmjax.data.config import DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.objectives.objective import open_objective
from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.run.config import RunConfig, objective
from tests.data.preparation import BYTES, run_prepare

TOKENIZER = Bytes()
BOS, EOS, SEQ_LEN = TOKENIZER.bos_id, TOKENIZER.eos_id, 32
CONTRASTIVE = ObjectiveConfig(name="contrastive")


class Framed(Bytes):
    """Bytes with the frame of an imported BERT."""

    def __init__(self):
        super().__init__()
        self.prompt_frame = (self.bos_id,), (self.eos_id,)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """(folder, config, records) by the number of texts of a record; the last record is longer than a row."""
    root, stores = tmp_path_factory.mktemp("texts"), {}
    records = [{"text": "a" * n, "pair": "b" * (n % 3 + 1), "negative": "c" * (n % 4 + 1)} for n in range(1, 12)]
    records.append({"text": "a" * 50, "pair": "bb", "negative": "c" * 40})
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for texts in (2, 3):
        source = SourceConfig(
            path=str(root / "records.jsonl"),
            pair_field="pair",
            negative_field="negative" if texts == 3 else "",
            split="train",
        )
        sources = {"main": source}
        config = DataConfig(sources=sources, tokenizer=BYTES, workers=1, seq_len=SEQ_LEN, packing="none")
        stores[texts] = root / str(texts), config, records, run_prepare(config, root / str(texts))
    return stores


def make(texts: int, tokenizer=TOKENIZER, seq_len: int = SEQ_LEN):
    return open_objective(CONTRASTIVE, tokenizer, seq_len=seq_len, num_texts=texts, one_segment=True)


def eval_batches(stores, texts: int, batch: int = 4, **options):
    folder, config, *_ = stores[texts]
    data = EvalData(folder, config, split="train", source="main", batch=batch, objective=make(texts, **options))
    return list(data.batches(np.arange(batch)))


def expected_texts(record: dict, texts: int) -> list[str]:
    values = [record["text"], record["pair"], record["negative"]][:texts]
    # 32 positions are a BOS for each text and the texts, of which the longest become equal.
    free = SEQ_LEN - texts
    if sum(map(len, values)) <= free:
        return values
    return [values[0][: free - 2], "bb"] if texts == 2 else [values[0][:13], "bb", values[2][:13]]


@pytest.mark.parametrize("texts", [2, 3])
def test_a_row_is_one_record(stores, texts):
    seen = []
    for batch in eval_batches(stores, texts):
        assert batch.num_texts == texts and not batch.one_segment and not batch.targets.any()
        for row in range(len(batch.inputs)):
            parts = [batch.inputs[row][batch.segments[row] == number + 1].tolist() for number in range(texts)]
            seen.append([TOKENIZER.decode(part[1:]) for part in parts])
            assert all(part[0] == BOS for part in parts) and batch.segments[row].max() == texts
            assert batch.weights[row].tolist() == [1.0] + [0.0] * (SEQ_LEN - 1)
            for number in range(texts):
                positions = batch.positions[row][batch.segments[row] == number + 1]
                assert positions.tolist() == list(range(len(positions)))
    assert seen == [expected_texts(record, texts) for record in stores[texts][2]]


def test_records_that_were_cut_are_counted(stores):
    manifest, lines = stores[3][3]
    assert manifest["sources"]["main"]["cut"] == 1 and any("1 texts were cut to data.seq_len=32" in s for s in lines)


def test_the_frame_of_an_imported_tokenizer_surrounds_each_text(stores):
    batch = eval_batches(stores, 2, tokenizer=Framed(), seq_len=SEQ_LEN + 2)[0]
    inside = batch.inputs[2][batch.segments[2] > 0].tolist()
    assert inside == [BOS, *b"aaa", EOS, BOS, *b"b", EOS]


def test_a_record_keeps_its_score(tmp_path):
    lines = [json.dumps({"text": "a" * n, "pair": "b", "score": str(n / 10)}) + "\n" for n in range(1, 11)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), pair_field="pair", score_field="score", split="train")
    config = DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, seq_len=SEQ_LEN, packing="none")
    run_prepare(config, tmp_path / "store")
    objective = open_objective(ObjectiveConfig(name="similarity"), TOKENIZER, seq_len=SEQ_LEN)
    data = EvalData(tmp_path / "store", config, split="train", source="main", batch=10, objective=objective)
    batch = next(iter(data.batches(np.arange(10))))
    lengths = (batch.segments == 1).sum(axis=1) - 1
    np.testing.assert_allclose(batch.labels[:, 0, 0], lengths / 10, rtol=1e-6)
    assert not batch.labels[:, 1:].any() and not batch.multi_label


def test_rows_without_a_record_are_padding(stores):
    last = eval_batches(stores, 2, batch=5)[-1]
    assert last.weights[:2, 0].all() and not last.weights[2:].any() and not last.segments[2:].any()


def test_a_row_depends_on_nothing_else(stores):
    folder, config, *_ = stores[3]
    data = TrainData(folder, config, seed=1, global_batch=3, objective=make(3))
    whole = next(data.batches(data.start(), np.arange))[0]
    part = next(data.batches(data.start(), lambda _: np.array([2])))[0]
    for name in ("inputs", "weights", "segments", "positions"):
        np.testing.assert_array_equal(getattr(whole, name)[2:], getattr(part, name))
    data.close()


def test_the_run_counts_the_texts(stores):
    for texts, (_, data, *_) in stores.items():
        config = RunConfig(data=data, objective=CONTRASTIVE)
        assert objective(config, TOKENIZER).fingerprint == f"contrastive {texts} texts"
