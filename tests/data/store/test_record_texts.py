"""Records of several texts: how much of each is kept, and what is refused by name."""

import json

import pytest

from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.store.record_texts import cut_longest
from llmjax.errors import UserError
from tests.data.preparation import BYTES, run_prepare


@pytest.mark.parametrize(
    ("lengths", "total", "kept"),
    [
        ([3, 4], 7, [3, 4]),
        ([9, 2], 7, [5, 2]),
        ([2, 9], 7, [2, 5]),
        ([9, 8], 7, [3, 3]),
        ([9, 1, 8], 9, [4, 1, 4]),
        ([0, 9], 4, [0, 4]),
    ],
)
def test_the_longest_texts_are_cut_to_one_length(lengths, total, kept):
    assert cut_longest(lengths, total) == kept


def prepare(folder, *records, more=(), **fields):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = {"main": SourceConfig(path=str(path), **fields), **dict(more)}
    return run_prepare(DataConfig(sources=sources, tokenizer=BYTES, workers=1, seq_len=8), folder / "store")


PAIR = {"text": "a", "pair": "b"}


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ({"text": "a"}, {}, r"a.jsonl:2: the record has no 'pair'; name the column that holds it"),
        ({"text": "a", "pair": 3}, {}, r"1 field 'pair' is not a text"),
        (PAIR, {"negative_field": "no"}, r"a.jsonl:1: the record has no 'no'"),
        (PAIR, {"score_field": "no"}, r"a.jsonl:1: the record has no 'no'"),
        (PAIR, {"score_field": "text"}, r"a.jsonl:1: the score 'a' is not a number from -1 to 1, as cosines are"),
        (PAIR, {"score_field": "pair", "negative_field": "text"}, r"set only one of score_field and negative_field"),
        (PAIR, {"pair_field": "", "negative_field": "pair"}, r"negative_field='pair': set pair_field as well"),
        (PAIR, {"negative_field": "pair", "label_field": "pair"}, r"negative_field='pair': unset label_field"),
    ],
)
def test_bad_records_and_settings_are_refused(tmp_path, record, fields, message):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, PAIR, record, **{"pair_field": "pair", **fields})


def test_sources_with_other_numbers_of_texts_are_refused(tmp_path):
    more = {"other": SourceConfig(path=str(tmp_path / "a.jsonl"))}
    with pytest.raises(UserError, match=r"different numbers of texts \(main 2, other 1\)"):
        prepare(tmp_path, PAIR, pair_field="pair", more=more)


def test_text_files_have_no_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n")
    config = DataConfig(sources={"main": SourceConfig(path=str(tmp_path / "a.txt"), pair_field="pair")})
    with pytest.raises(UserError, match=r"pair_field='pair': .* is text, which has no fields"):
        run_prepare(config, tmp_path / "store")


def test_rows_too_short_for_the_texts_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    source = SourceConfig(path=str(path), pair_field="pair", split="train")
    config = DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, seq_len=3)
    with pytest.raises(UserError, match=r"data.seq_len=3: has no positions for 2 texts; set it to 4 or more"):
        run_prepare(config, tmp_path / "store")
