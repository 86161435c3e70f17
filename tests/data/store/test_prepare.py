"""Preparation: documents come back from the store, honest counts, one line for bad input."""

import dataclasses
import gzip
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmjax.data.config import DataConfig, SourceConfig, SplitConfig, TokenizerConfig
from llmjax.data.readers import sources
from llmjax.data.store import stages
from llmjax.data.store.prepare import read_manifest
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from tests.data.preparation import BYTES, SMALL, SPLITS, all_texts, config, read_texts, run_prepare, sentence


def test_documents_round_trip_through_the_store(corpus, tmp_path):
    path, texts = corpus
    manifest, _ = run_prepare(config(path, tokenizer=SMALL), tmp_path / "s")
    by_split = read_texts(tmp_path / "s")
    assert sorted(all_texts(by_split)) == sorted(texts) and all(by_split.values())
    assert manifest == read_manifest(tmp_path / "s")
    assert manifest["tokenizer"]["lossless"] and manifest["tokenizer"]["vocab_size"] == 300
    record = manifest["sources"]["main"]
    assert {s: record[s]["documents"] for s in SPLITS} == {s: len(by_split[s]) for s in SPLITS}
    assert record["train"]["tokens"] == TokenStore(tmp_path / "s/main/train").tokens
    validation = [text.encode() for text in by_split["validation"]]
    measured = manifest["compressors"]["gzip -9"]
    assert measured["concatenated"] == len(gzip.compress(b"".join(validation), 9))
    assert measured["per_document"] == sum(len(gzip.compress(text, 9)) for text in validation)
    assert 0 < manifest["compressors"]["xz -9"]["concatenated"] < sum(map(len, validation))
    assert not (tmp_path / "s/unfinished").exists()


def test_a_finished_store_is_used_as_it_is(corpus, tmp_path):
    manifest, _ = run_prepare(config(corpus[0]), tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    again, lines = run_prepare(config(corpus[0], seq_len=99, workers=2), tmp_path / "s")
    assert again == manifest and not lines
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}


def test_other_settings_are_refused_with_the_differences(corpus, tmp_path):
    run_prepare(config(corpus[0]), tmp_path / "s")
    other = config(corpus[0], split=SplitConfig(test=0.2))
    with pytest.raises(UserError, match=r"data\.split\.test: 0\.05 -> 0\.2\); use another --workdir"):
        run_prepare(other, tmp_path / "s")


def test_near_copies_share_a_split_across_sources(tmp_path):
    rng = random.Random(5)
    originals = [sentence(rng, 200) for _ in range(150)]
    for name, ending in (("a", ""), ("b", " and a word more")):
        lines = (json.dumps({"text": text + ending}) + "\n" for text in originals)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    both = {name: SourceConfig(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    fractions = SplitConfig(validation=0.2, test=0.2)
    run_prepare(DataConfig(sources=both, tokenizer=BYTES, split=fractions, workers=1), tmp_path / "s")
    a, b = read_texts(tmp_path / "s", "a"), read_texts(tmp_path / "s", "b")
    assert all(len(a[split]) > 10 for split in SPLITS)
    assert {s: [text + " and a word more" for text in a[s]] for s in SPLITS} == b
    apart = SplitConfig(validation=0.2, test=0.2, near_copies=False)
    run_prepare(DataConfig(sources=both, tokenizer=BYTES, split=apart, workers=1), tmp_path / "t")
    assert len(read_texts(tmp_path / "t", "a")["test"]) and read_texts(tmp_path / "t", "b") != b


def test_a_single_book_is_cut_into_parts(tmp_path):
    rng = random.Random(6)
    book = "\r\n\r\n".join(sentence(rng, rng.randrange(20, 300)) for _ in range(400))
    (tmp_path / "book.txt").write_bytes(book.encode())
    manifest, lines = run_prepare(config(tmp_path / "book.txt"), tmp_path / "s")
    by_split = read_texts(tmp_path / "s")
    assert all(by_split[split] for split in SPLITS)
    size = manifest["sources"]["main"]["part_bytes"]
    assert 1024 <= size <= 16384
    assert any("too few documents for data.split (1)" in line and "cut at blank lines" in line for line in lines)
    parts = all_texts(by_split)
    # Put together in their order in the book, the parts are the book.
    assert "".join(sorted(parts, key=book.index)) == book
    assert all(size <= len(part.encode()) <= 2 * size for part in sorted(parts, key=book.index)[:-1])


def test_short_text_does_not_fill_three_splits(tmp_path):
    (tmp_path / "note.txt").write_text("just a note\n")
    manifest, lines = run_prepare(config(tmp_path / "note.txt"), tmp_path / "s")
    assert [manifest["sources"]["main"][split]["documents"] for split in SPLITS] == [1, 0, 0]
    assert any("too little text for a validation and a test split" in line for line in lines)
    assert manifest["compressors"] is None


def test_another_name_of_the_text_field_is_suggested_as_the_fix(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "text"}\n')
    with pytest.raises(UserError, match=r"1 no field 'text'.*; data\.sources\.main\.text_field must name the field"):
        run_prepare(config(tmp_path / "a.jsonl"), tmp_path / "s")


def test_rejects_are_counted_and_listed(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(97)] + ["{no", '{"text": 3}', '{"text": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"2 of 99 records cannot be used .*1 not JSON.*max_bad_fraction=0\.01"):
        run_prepare(config(tmp_path / "a.jsonl"), tmp_path / "s")
    rejects = [json.loads(line) for line in (tmp_path / "s/rejects.jsonl").read_text().splitlines()]
    assert [record["reason"] for record in rejects] == ["not JSON", "field 'text' is not a text", "empty"]
    assert (
        rejects[0]["excerpt"] == "{no" and rejects[0]["where"].endswith("a.jsonl:98") and rejects[0]["source"] == "main"
    )
    # The limit decides on no content, so raising it goes on with what was read.
    manifest, lines = run_prepare(config(tmp_path / "a.jsonl", max_bad_fraction=0.03), tmp_path / "s")
    assert lines[0] == "resuming the interrupted preparation"
    assert manifest["sources"]["main"]["rejected"] == {"empty": 1, "field 'text' is not a text": 1, "not JSON": 1}


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_corpus(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    for near_copies in (True, False):
        with pytest.raises(UserError, match=r"contains no text \(1 empty\)"):
            run_prepare(config(tmp_path / "*.txt", split=SplitConfig(near_copies=near_copies)), tmp_path / "s")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"sources": {"a/b": SourceConfig()}}, "'a/b' cannot name a folder"),
        ({"sources": {"plans": SourceConfig()}}, "'plans' cannot name a folder"),
        ({"tokenizer": TokenizerConfig(kind="huggingface")}, "data.tokenizer.path is empty"),
        ({"tokenizer": TokenizerConfig(kind="byte")}, "did you mean 'bytes'"),
        ({"tokenizer": TokenizerConfig(path="/absent.model")}, "no such file"),
        ({"tokenizer": TokenizerConfig(vocab_size=10**6)}, "vocab_size=1000000: cannot be trained"),
        ({"split": SplitConfig(test=2.0)}, "data.split.test=2.0"),
    ],
)
def test_invalid_settings(corpus, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        run_prepare(dataclasses.replace(config(corpus[0]), **fields), tmp_path / "s")


def test_a_tokenizer_that_loses_text_is_reported(corpus, tmp_path):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "abcd": 2}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>", "<unk>"])
    model.save(str(tmp_path / "t.json"))
    lossy = TokenizerConfig(kind="huggingface", path=str(tmp_path / "t.json"))
    manifest, lines = run_prepare(config(corpus[0], tokenizer=lossy), tmp_path / "s")
    assert manifest["tokenizer"]["lossy_documents"] == 300 and not load_tokenizer(tmp_path / "s").lossless
    assert any("loses text: 300 documents" in line for line in lines)
    # Another file under the same name is another setting; a deleted file is not, since the store has its copy.
    (tmp_path / "t.json").write_text((tmp_path / "t.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"data\.tokenizer\.sha256"):
        run_prepare(config(corpus[0], tokenizer=lossy), tmp_path / "s")
    (tmp_path / "t.json").unlink()
    assert run_prepare(config(corpus[0], tokenizer=lossy), tmp_path / "s")[0] == manifest


def test_corpus_hash_and_fingerprint_do_not_depend_on_paths(corpus, tmp_path):
    shutil.copytree(corpus[0].parent, tmp_path / "moved", ignore=shutil.ignore_patterns("moved"))
    one, _ = run_prepare(config(corpus[0]), tmp_path / "s")
    two, _ = run_prepare(config(tmp_path / "moved/a.jsonl"), tmp_path / "t")
    assert (one["fingerprint"], one["corpus_sha256"]) == (two["fingerprint"], two["corpus_sha256"])
    table = pa.table({"text": [*corpus[1][:-1], "changed"]})
    pq.write_table(table, tmp_path / "b.parquet")
    three, _ = run_prepare(config(tmp_path / "b.parquet"), tmp_path / "u")
    assert three["corpus_sha256"] != one["corpus_sha256"] and three["fingerprint"] != one["fingerprint"]


def test_xz_output_has_the_size_of_level_9():
    import lzma

    for size in (0, 10, 5000, 200_000):
        data = random.Random(size).randbytes(size // 2) * 2
        assert len(stages._xz(data)) == len(lzma.compress(data, preset=9))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["peps/*.jsonl.gz", "gutenberg/[df]*.txt.gz", "tldr/tldr-12*.jsonl.gz"])
def test_public_documents_round_trip(shared_data, tmp_path, pattern):
    trained = TokenizerConfig(vocab_size=4096, training_bytes=2_000_000)
    manifest, _ = run_prepare(config(shared_data / pattern, tokenizer=trained, workers=2), tmp_path / "s")
    assert manifest["tokenizer"]["lossless"] and manifest["tokenizer"]["lossy_documents"] == 0
    units = sources.list_units("main", SourceConfig(path=str(shared_data / pattern)))
    part_bytes = manifest["sources"]["main"]["part_bytes"]
    expected = [
        record.text for unit in units for record in stages.read_unit(unit, part_bytes) if hasattr(record, "text")
    ]
    assert sorted(all_texts(read_texts(tmp_path / "s"))) == sorted(expected)


def test_records_that_name_their_split_stay_in_it(tmp_path):
    named = {f"text {number} of {split}": split for split in SPLITS for number in range(5)}
    lines = [json.dumps({"text": text, "split": split}) for text, split in named.items()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "lost", "split": "dev"}', '{"text": "none"}']))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), split_field="split")
    data_config = DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, max_bad_fraction=0.2)
    manifest, lines = run_prepare(data_config, tmp_path / "store")
    assert {text: split for split, texts in read_texts(tmp_path / "store").items() for text in texts} == named
    assert manifest["sources"]["main"]["rejected"] == {"field 'split' names no split": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text", "is no JSONL; leave it unset"),
        ("a.jsonl", '{"text": "one", "split": "test"}', "no record names the split train or validation"),
    ],
)
def test_records_that_name_no_usable_split(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    source = SourceConfig(path=str(tmp_path / name), split_field="split")
    with pytest.raises(UserError, match=message):
        run_prepare(DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1), tmp_path / "store")
