"""Whole analyses of models that were scored here: classes, likelihoods, and tasks whose records have changed."""

import json

from etils import epath
import numpy as np
import pytest

from llmjax.analysis import analyse as analysis, task_examples, token_losses, train_texts
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig
from llmjax.parallel import axes
from llmjax.report import analysis_page
from tests.evals.tasks.models import CLASSES, evaluate, make_loaded, make_model, write_records
from tests.report.runs import HOSTILE, PageParser, check_svgs
from tests.serve import runs
from tests.train.trainer import one_device

TOPICS = {"bad": "awful dull tedious", "fair": "plain usual middling", "good": "superb moving brilliant"}
FILLERS = ["the", "film", "of", "a", "was", "by"]


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules):
        yield


def make_records(count: int, seed: int) -> list[dict]:
    """Reviews whose words say their class."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        label = CLASSES[number % 3]
        words = [*rng.choice(TOPICS[label].split(), 3), *rng.choice(FILLERS, 4), f"n{number}"]
        records.append({"text": " ".join(rng.permutation(words)), "label": label, "source": "ab"[number % 2]})
    return records


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """(folder, the scored task, its analysis, the training texts): 6 of 60 labels are wrong, one text is a copy."""
    folder = tmp_path_factory.mktemp("classified")
    train, records = make_records(90, 1), make_records(60, 0)
    train[7]["text"] = records[3]["text"] = (
        "the very same sentence about a middling film in both of the files, word by word"
    )
    train[7]["label"] = records[3]["label"] = "fair"
    for number in range(0, 60, 10):
        records[number]["label"] = CLASSES[(CLASSES.index(records[number]["label"]) + 1) % 3]
    records[5]["text"] += " <script>alert('x')</script>"
    write_records(folder / "train.jsonl", train)
    task = TaskConfig(kind="classify", path=write_records(folder / "a.jsonl", records))
    evaluate(folder, make_loaded("classify"), task)
    scored = task_examples.read(epath.Path(folder), "mine")
    texts = train_texts.read_file(str(folder / "train.jsonl"), scored)
    return folder, scored, analysis.analyse(scored, texts), texts


def test_classes_are_analysed(classified):
    _, scored, result, _ = classified
    lines = scored.lines
    wrong = [line["index"] for line in lines if line["target"] != line["prediction"]]
    assert sum(each.count for each in result.confusions) == len(wrong) == sum(scored.errors)
    counts = [each.count for each in result.confusions]
    assert counts == sorted(counts, reverse=True)
    losses = [each.loss for each in result.worst]
    assert losses == sorted(losses, reverse=True) and losses[0] == max(line["log_loss"] for line in lines)
    assert {each.index for each in result.worst} <= set(wrong)
    assert [(copy.index, copy.train_index) for copy in result.near_copies] == [(3, 7)]
    assert {each.field for each in result.slices} >= {"class", "source"}
    assert result.learning_curve.num_test == 60 and result.learning_curve.sizes[-1] == 90
    assert result.train_total == 90 and not result.mismatch.is_alarm and result.vectors == "TF-IDF"


def test_a_large_file_of_training_texts_is_sampled_and_counted(classified, monkeypatch):
    folder, scored, _, _ = classified
    monkeypatch.setattr(train_texts, "MAX_TEXTS", 50)
    texts = train_texts.read_file(str(folder / "train.jsonl"), scored)
    assert len(texts.texts) == len(texts.labels) == 50 and texts.total == 90


def test_planted_label_errors_are_suggested(classified):
    _, scored, result, _ = classified
    found = {error.index: error for error in result.label_errors}
    planted = set(range(0, 60, 10))
    assert len(planted & set(found)) >= 5 and len(found) <= 8
    scores = [error.score for error in result.label_errors]
    assert scores == sorted(scores, reverse=True)
    records = analysis.list_suggestions(scored, result)
    assert len(records) == 60 and [r["label"] for r in records] == [line["target"] for line in scored.lines]
    for index, record in enumerate(records):
        assert ("suggested_label" in record) == (index in found)
        if index in planted & set(found):
            assert record["suggested_label"] == CLASSES[index % 3] != record["label"]


def test_the_page_and_the_file(classified):
    folder, scored, result, texts = classified
    content = json.loads(json.dumps(analysis.to_json(result)))
    assert set(content["label_errors"][0]) == {"index", "given", "suggested", "score"}
    assert content["mismatch"]["alarm"] is False and len(content["mismatch"]["tests"]) == 3
    path = epath.Path(folder) / "page.html"
    analysis_page.write_page(result, scored, path, train_texts=texts.texts)
    page = path.read_text()
    parser = PageParser(page)
    assert "Likely label errors" in parser.text and "alert('x')" in parser.text and "<script" not in page
    assert check_svgs(page) == 1 and "probabilities: " in parser.text
    for step in result.next_steps:
        assert f'id="{step.evidence}"' in page and f'href="#{step.evidence}"' in page


def test_copies_of_training_texts_are_the_first_thing_to_do(tmp_path):
    records = make_records(60, 0)
    task = TaskConfig(kind="classify", path=write_records(tmp_path / "a.jsonl", records))
    evaluate(tmp_path, make_loaded("classify"), task)
    scored = task_examples.read(epath.Path(tmp_path), "mine")
    texts = train_texts.read_file(task.path, scored)
    never = lambda texts: pytest.fail("the states of a model that was trained on these examples know their labels")
    result = analysis.analyse(scored, texts, embed=never, vectors_name="states")
    assert len(result.near_copies) == 60 and result.next_steps[0].evidence == "near_copies"
    assert result.vectors == "TF-IDF" and "--vectors" in result.missing["vectors"]


@pytest.mark.parametrize("kind", ["choice", "pairs", "perplexity", "generate"])
def test_token_losses_of_likelihoods(tmp_path, kind):
    words = [f"na\u00efve {number}" for number in range(24)]
    words[2] = HOSTILE.replace("\ud800", "")
    records = [
        {"question": text, "choices": ["yes", "no"], "answer": "yes", "good": text, "bad": text[::-1], "text": text}
        for text in words
    ]
    options = {"max_tokens": 3} if kind == "generate" else {}
    task = TaskConfig(kind=kind, path=write_records(tmp_path / "a.jsonl", records), **options)
    evaluate(tmp_path, make_loaded(), task)
    scored = task_examples.read(epath.Path(tmp_path), "mine")
    worst = analysis.find_worst(scored)
    losses = token_losses.compute_token_losses(make_model(), scored, worst)
    result = analysis.analyse(scored, "there are none", token_losses=losses)
    assert result.missing["mismatch"] == "there are none" and result.label_errors is None
    for each in result.worst:
        line, first = scored.lines[each.index], each.token_losses[0]
        assert len(first.tokens) == len(first.losses)
        if kind in ("pairs", "perplexity"):
            assert "".join(first.tokens) == records[each.index]["text"]
        if kind == "pairs":
            expected = -line["nats"][0]
        elif kind == "choice":
            expected = -line["nats"][line["choices"].index(line["target"])]
        else:  # of generation, the file has no likelihood of the right answer
            expected = line["nats"] if kind == "perplexity" else sum(first.losses)
        assert sum(first.losses) == pytest.approx(expected, rel=1e-4)
    path = epath.Path(tmp_path) / "page.html"
    analysis_page.write_page(result, scored, path)
    page = path.read_text()
    if kind == "choice":
        both = sum(len(each.token_losses) == 2 for each in result.worst)
        assert page.count("<i>\u2026</i>") == both > 0, "a prompt is shown once"
    if kind in ("pairs", "perplexity"):
        assert 'nats">\u00ef</span>' in page, "the two bytes of a character are shown as one"
    assert 'class="heat"' in page and "<script" not in page and "--heat:" in page
    assert PageParser(page).text.count("example ") >= len(result.worst)


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    folder = epath.Path(tmp_path)
    path = write_records(tmp_path / "a.jsonl", make_records(12, 0))
    with pytest.raises(UserError, match=r"--task=mine: .* \(it has: none\); run `llmjax eval"):
        task_examples.read(folder, "mine")
    evaluate(tmp_path, make_loaded("classify"), TaskConfig(kind="classify", path=path))
    with pytest.raises(UserError, match=r"--task=mien \(did you mean"):
        task_examples.read(folder, "mien")
    with pytest.raises(UserError, match=r"--step=3: the task 'mine' was not scored at this step, only at 0"):
        task_examples.read(folder, "mine", 3)
    scored = task_examples.read(folder, "mine")
    for records, message in (
        ([], r"eval.tasks.train.path=.*: has no examples"),
        ([{"txt": "a"}], r"--train.text_field: .* has no 'text'; name one of its fields: txt"),
        ([{"text": "a", "label": "odd"}], r"--train: .* has the unknown label 'odd'; expected bad, fair, good"),
    ):
        other = write_records(tmp_path / "other.jsonl", records)
        with pytest.raises(UserError, match=message):
            train_texts.read_file(other, scored)
    write_records(tmp_path / "a.jsonl", make_records(11, 0))
    with pytest.raises(UserError, match=r"has 11 examples, and 12 were scored; run `llmjax eval"):
        task_examples.read(folder, "mine")
    write_records(tmp_path / "a.jsonl", make_records(12, 5))
    with pytest.raises(UserError, match=r"example 0 is not the one that was scored"):
        task_examples.read(folder, "mine")
    write_records(tmp_path / "a.jsonl", [{"words": "a"}] * 12)
    with pytest.raises(UserError, match=r"eval.tasks.mine.text_field: .* has no 'text'"):
        task_examples.read(folder, "mine")
    lines = tmp_path / "eval" / "0" / "mine.jsonl"
    lines.write_text("{]\n")
    with pytest.raises(UserError, match=r"line 1 is not the result of an example"):
        task_examples.read(folder, "mine")
    lines.unlink()
    with pytest.raises(UserError, match=r"no per-example results there; run `llmjax eval"):
        task_examples.read(folder, "mine")
