"""The classifier separates good from bad texts, is reproducible, and refuses other files."""

import json
import math
import random
import time
import zipfile

import numpy as np
import pytest

from llmjax.cli import main
from llmjax.curate.filters.classifier import Classifier, Evaluation, load, train, train_folders
from llmjax.curate.filters.quality_config import ClassifierConfig
from llmjax.errors import UserError

SMALL = ClassifierConfig(num_buckets=1 << 12)


def texts(count: int = 120) -> tuple[list[str], list[str]]:
    """Sentences, and the noise of web pages."""
    rng = random.Random(0)
    nouns, verbs = ["river", "ferry", "teacher", "garden", "letter", "winter"], ["saw", "found", "left", "knew"]
    noise = ["BUY", "now!!!", "click", "here", "$$$", "free", "SALE", "winner", "river"]
    good = [
        " ".join(
            f"The {rng.choice(nouns)} that we {rng.choice(verbs)} was {rng.randrange(999)} years old." for _ in "123"
        )
        for _ in range(count)
    ]
    bad = [" ".join(rng.choice(noise) + str(rng.randrange(99)) for _ in range(20)) for _ in range(count)]
    return good, bad


def test_good_and_bad_are_separated():
    good, bad = texts()
    model, evaluation = train(good, bad, SMALL)
    assert 20 < evaluation.num_texts < 80 and evaluation.accuracy == 1 and evaluation.auc == 1
    assert model.score("The teacher that we knew found a letter.") > 0.5 > model.score("click here BUY SALE now!!!")


def test_order_and_copies_of_texts_do_not_change_the_model():
    good, bad = texts()
    model, evaluation = train(good, bad, SMALL)
    reordered, reordered_evaluation = train(reversed(good), [*bad[60:], *bad[:60], bad[3]], SMALL)
    assert (model.weights == reordered.weights).all() and evaluation == reordered_evaluation
    other, _ = train(good, bad, ClassifierConfig(num_buckets=1 << 12, seed=1))
    assert (model.weights != other.weights).any()


def test_good_and_bad_texts_have_equal_total_weight():
    good, bad = texts(400)
    model, _ = train(good, bad[:40], SMALL)
    assert model.score("") == pytest.approx(0.5, abs=0.2)
    assert all(model.score(text) < 0.5 for text in bad[40:])


def test_a_saved_model_is_loaded_unchanged(tmp_path):
    good, bad = texts()
    model, _ = train(good, bad, SMALL)
    model.save(tmp_path / "a.npz")
    model.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = load(tmp_path / "a.npz")
    assert [loaded.score(text) for text in good] == [model.score(text) for text in good]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    with pytest.raises(UserError, match=r"must end in \.npz"):
        model.save(tmp_path / "model.bin")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.npz")
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", b"PK\x03\x04half")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a classifier;"):
            load(tmp_path / name)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="not a classifier;"):
        load(tmp_path / "other.npz")
    np.savez(tmp_path / "later.npz", weights=np.zeros(3, np.float32), settings=np.array([2, 100, 0]))
    with pytest.raises(UserError, match="written by another version"):
        load(tmp_path / "later.npz")


def test_folders_are_read_as_texts_and_jsonl(tmp_path):
    good, bad = texts()
    (tmp_path / "good" / "deep").mkdir(parents=True)
    (tmp_path / "bad").mkdir()
    for index, text in enumerate(good[:60]):
        (tmp_path / "good" / "deep" / f"{index}.txt").write_text(text + "\r\n")
    (tmp_path / "good" / "rest.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in good[60:]))
    (tmp_path / "bad" / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in bad))
    model, _ = train_folders(tmp_path / "good", tmp_path / "bad", SMALL)
    assert (model.weights == train(good, bad, SMALL)[0].weights).all()
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no file matches"):
        train_folders(tmp_path / "good", tmp_path / "none", SMALL)


def test_unusable_training_sets_are_refused():
    good, bad = texts(20)
    with pytest.raises(UserError, match="no bad texts"):
        train(good, [], SMALL)
    with pytest.raises(UserError, match="1 texts are among both the good and the bad ones"):
        train(good, [*bad, good[0]], SMALL)
    with pytest.raises(UserError, match="expected a power of two"):
        ClassifierConfig(num_buckets=1000)


def test_without_held_out_texts_nothing_is_evaluated():
    good, bad = texts(20)
    model, evaluation = train(good, bad, ClassifierConfig(num_buckets=1 << 12, held_out_fraction=0.0))
    assert evaluation.num_texts == 0 and math.isnan(evaluation.accuracy) and math.isnan(evaluation.auc)
    assert model.score(good[0]) > 0.5 > model.score(bad[0])
    assert isinstance(evaluation, Evaluation) and isinstance(model, Classifier)


@pytest.mark.parametrize("text", ["", "\n", "a", "漢" * 10_000, "😀", "\ud800", "x" * 1_000_000, " " * 1_000_000])
def test_every_text_has_a_score(text):
    good, bad = texts(20)
    model, _ = train([*good, ""], [*bad, "."], SMALL)
    started = time.process_time()
    assert 0 <= model.score(text) <= 1
    assert time.process_time() - started < 2


def test_film_reviews_are_classified(shared_data):
    with zipfile.ZipFile(shared_data / "sentence-polarity" / "sentence_polarity.zip") as file:
        read = lambda end: {
            line
            for name in file.namelist()
            if name.endswith(end)
            for line in file.read(name).decode("latin-1").split("\n")
        }
        good, bad = read("rt-polarity.pos"), read("rt-polarity.neg")
    started = time.process_time()
    _, evaluation = train(good - bad, bad - good)
    assert evaluation.accuracy > 0.76  # 0.78 of 2,200 reviews
    assert time.process_time() - started < 30  # about 4 s


def test_the_command_trains_and_evaluates(tmp_path, capsys):
    for name, side in zip(("good", "bad"), texts(), strict=True):
        (tmp_path / name).mkdir()
        for number, text in enumerate(side):
            (tmp_path / name / f"{number}.txt").write_text(text)
    command = ["curate", "classifier", f"--good={tmp_path}/good", f"--bad={tmp_path}/bad"]
    assert main.run([*command, f"--to={tmp_path}/model.npz"]) == 0
    out = capsys.readouterr().out
    assert "100.0% correct" in out and "curate.quality.classifier=" in out
    assert load(tmp_path / "model.npz").score("The teacher that we knew found a letter.") > 0.5
    with pytest.raises(UserError, match="must end in"):
        main.run([*command, "--to=model"])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: no file there"):
        main.run([*command[:3], f"--bad={tmp_path}/none", f"--to={tmp_path}/model.npz"])
