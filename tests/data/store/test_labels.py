"""Labels of documents are stored beside their tokens, and a bad one is refused by name."""

import json

import numpy as np
import pytest

from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.store.labels import LabelFormat, join_texts
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.errors import UserError
from tests.data.preparation import BYTES, run_prepare

CLASSES = LabelFormat(classes=("no", "yes"), multi_label=False, seq_len=16)
MANY = LabelFormat(classes=("a", "b", "c"), multi_label=True, seq_len=16)
NUMBERS = LabelFormat(classes=(), multi_label=False, seq_len=16)


@pytest.mark.parametrize(
    ("form", "label", "stored"),
    [
        (CLASSES, "yes", [1]),
        (LabelFormat(classes=("0", "1"), multi_label=False, seq_len=16), 1, [1]),
        (MANY, ["c", "a"], [1, 0, 1]),
        (MANY, [], [0, 0, 0]),
        (NUMBERS, "2.5", [2.5]),
        (NUMBERS, -3, [-3]),
    ],
)
def test_a_label_becomes_numbers(form, label, stored):
    parsed = form.parse(label, "f.csv")
    assert parsed.dtype == np.float32 and parsed.tolist() == stored and len(parsed) == form.width


@pytest.mark.parametrize(
    ("form", "label", "message"),
    [
        (CLASSES, "yess", r"f.csv:3: the label 'yess' is not one of data.classes \(no, yes\).*yes"),
        (CLASSES, True, "not one of data.classes"),
        (MANY, "a", "not a list of classes"),
        (MANY, ["a", "d"], "'d' is not one of"),
        (NUMBERS, "good", "'good' is not a number; set data.classes"),
        (NUMBERS, "nan", "not a number"),
        (NUMBERS, True, "not a number"),
    ],
)
def test_a_bad_label_is_refused(form, label, message):
    with pytest.raises(UserError, match=message):
        form.parse(label, "f.csv:3")


@pytest.mark.parametrize(
    ("first", "second", "kept", "cut"),
    [
        (4, None, (4, None), False),
        (9, None, (7, None), True),
        (2, 4, (2, 4), False),
        (9, 2, (4, 2), True),
        (2, 9, (2, 4), True),
        (9, 8, (3, 3), True),
    ],
)
def test_the_longer_text_of_a_pair_is_cut_first(first, second, kept, cut):
    """A row of 8 has one position for BOS, and one between two texts; the EOS at the end is stored, not read."""
    tokenizer = Bytes()
    text = lambda size, start: None if size is None else np.arange(start, start + size, dtype=np.int32)
    ids, was_cut = join_texts(text(first, 10), text(second, 50), tokenizer, seq_len=8)
    expected = [*range(10, 10 + kept[0]), tokenizer.eos_id]
    expected += [] if kept[1] is None else [*range(50, 50 + kept[1]), tokenizer.eos_id]
    assert ids.tolist() == expected and was_cut == cut


def pairs_config(folder, **fields):
    """Pairs in a CSV file without a header."""
    lines = [f"text {number},other {number} is longer,{number / 4}" for number in range(40)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    source = SourceConfig(
        path=str(folder / "pairs.csv"), columns=("a", "b", "score"), text_field="a", pair_field="b", label_field="score"
    )
    return DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, seq_len=24, **fields)


def read_labels(store: TokenStore) -> dict[str, float]:
    tokenizer = Bytes()
    spans = zip(store.starts().tolist(), store.lengths().tolist(), strict=True)
    texts = [tokenizer.decode(store.read(start, length)) for start, length in spans]
    return dict(zip(texts, store.gather_labels(store.starts())[:, 0].tolist(), strict=True))


def test_every_document_keeps_its_label(tmp_path):
    manifest, lines = run_prepare(pairs_config(tmp_path), tmp_path / "store")
    labels = {}
    for split in ("train", "validation", "test"):
        labels |= read_labels(TokenStore(tmp_path / "store" / "main" / split))
    assert sorted(labels.values()) == [number / 4 for number in range(40)]
    # 24 positions are BOS, 7 or 6 bytes, EOS, and the beginning of "other N is longer".
    assert all(float(text.split()[1].partition("other")[0]) / 4 == label for text, label in labels.items())
    assert manifest["sources"]["main"]["cut"] == 40 and any("40 texts were cut to data.seq_len=24" in s for s in lines)


def test_labels_are_part_of_the_fingerprint_and_damage_is_noticed(tmp_path):
    config = pairs_config(tmp_path)
    first, _ = run_prepare(config, tmp_path / "store")
    text = (tmp_path / "pairs.csv").read_text()
    (tmp_path / "pairs.csv").write_text(text.replace(",9.75", ",9.5"))
    other, _ = run_prepare(config, tmp_path / "other")
    assert other["fingerprint"] != first["fingerprint"]
    path = next((tmp_path / "store" / "main" / "train").glob("labels-*.npy"))
    labels = np.load(path)
    labels[0] += 1
    np.save(path, labels)
    store = TokenStore(tmp_path / "store" / "main" / "train")
    with pytest.raises(UserError, match=r"labels .* are damaged"):
        store.gather_labels(store.starts()[:1])
    path.unlink()
    with pytest.raises(UserError, match=r"1 files are missing: labels-00000.npy"):
        TokenStore(tmp_path / "store" / "main" / "train")


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "b", "label": "maybe"}, r"a.jsonl:2: the label 'maybe' is not one of"),
        ({"text": "b"}, "a.jsonl:2: the record has no 'label'"),
    ],
)
def test_a_bad_record_stops_prepare_by_name(tmp_path, record, message):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "label": "yes"}, record)
    source = SourceConfig(path=path, label_field="label")
    config = DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, classes=("no", "yes"))
    with pytest.raises(UserError, match=message):
        run_prepare(config, tmp_path / "store")


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        ({}, {"classes": ("a", "b")}, "no source has labels"),
        ({"label_field": "label"}, {"classes": ("a", "a")}, "expected two or more different names"),
        ({"label_field": "label"}, {"multi_label": True}, "name the classes"),
        ({"split": "dev"}, {}, "expected one of train, validation, test"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, fields, more, message):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "label": "a"})
    config = DataConfig(sources={"main": SourceConfig(path=path, **fields)}, tokenizer=BYTES, workers=1, **more)
    with pytest.raises(UserError, match=message):
        run_prepare(config, tmp_path / "store")


def test_files_may_be_splits(tmp_path):
    sources = {}
    for split, count in (("train", 5), ("validation", 3), ("test", 2)):
        records = [{"text": f"{split} {number}", "label": "no"} for number in range(count)]
        path = write_jsonl(tmp_path / f"{split}.jsonl", *records)
        sources[split] = SourceConfig(path=path, label_field="label", split=split)
    config = DataConfig(sources=sources, tokenizer=BYTES, workers=1, classes=("no", "yes"))
    manifest, _ = run_prepare(config, tmp_path / "store")
    counts = {
        (name, split): record[split]["documents"]
        for name, record in manifest["sources"].items()
        for split in ("train", "validation", "test")
        if record[split]["documents"]
    }
    assert counts == {("train", "train"): 5, ("validation", "validation"): 3, ("test", "test"): 2}
