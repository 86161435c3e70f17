"""Consistency, truthfulness and stereotypes: the numbers of the model's own likelihoods, and of hand-made texts."""

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn

from llmjax.errors import UserError
from llmjax.evals import results
from llmjax.evals.config import TaskConfig
from llmjax.evals.consistency import unigram_surprise
from llmjax.parallel import axes
from tests.evals.tasks.models import evaluate, make_loaded, make_model, write_records
from tests.serve import runs
from tests.train.trainer import one_device

RNG = np.random.default_rng(0)
WORDS = ["".join(RNG.choice(list("abcdefgh "), size)) for size in RNG.integers(3, 12, 24)]


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules):
        yield


def log_likelihood(text: str, continuation: str) -> float:
    return make_model().loglikelihoods([make_model().encode_pair(text, continuation)])[0][0]


def test_unsupported_entities_and_their_measured_accuracy(tmp_path):
    records = [
        {"source": "anna had 3 cats", "text": "then Anna had three cats", "human": "yes"},
        {"source": "anna had 3 cats", "text": "then Bob had 4 cats on monday", "human": "no"},
        {"source": "bob left", "text": "left", "human": "yes"},
        {"source": "bob left", "text": "so Eve left", "human": "no"},
    ] * 3
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="consistency", path=path, methods=("support",), label_field="human", group_field="human")
    record, lines = evaluate(tmp_path, make_loaded(), task)
    values = {name: metric["value"] for name, metric in record["metrics"].items()}
    assert record["main"] == "unsupported_roc_auc" and values["unsupported_roc_auc"] == 1
    assert values["unsupported_balanced_accuracy"] == 1
    assert values["unsupported"] == pytest.approx(4 / 6)  # Bob, 4, monday, Eve; supported: Anna, three
    assert values["unsupported_names"] == pytest.approx(2 / 3) and values["unsupported_numbers"] == 0.5
    assert values["unsupported_dates"] == 1 and values["texts_with_unsupported"] == 0.5
    assert values["unsupported/yes"] == 0 and values["unsupported/no"] == 1
    assert lines[1]["unsupported"] == ["Bob", "4", "monday"]
    assert [line["prediction"] for line in lines] == [line["target"] for line in lines] == [True, False] * 6
    assert record["thresholds"]["unsupported"] == -0.5


def test_entailment_is_the_log_odds_of_yes(tmp_path):
    records = [{"claim": text, "source": text[::-1], "label": index % 2} for index, text in enumerate(WORDS)]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(
        **{"kind": "consistency", "path": path, "text_field": "claim", "methods": ("entailment",)},
        **{"verify_prompt": "{source}? {claim}: ", "choices": ("n", "yy")},
    )
    record, lines = evaluate(tmp_path, make_loaded(), task)
    odds = [
        log_likelihood(f"{each['source']}? {each['claim']}: ", "yy")
        - log_likelihood(f"{each['source']}? {each['claim']}: ", "n")
        for each in records
    ]
    assert [line["log_odds"] for line in lines] == pytest.approx(odds, rel=1e-3, abs=1e-3)
    assert record["metrics"]["entailed"]["value"] == np.mean(np.array(odds) > 0)
    expected = sklearn.roc_auc_score([each["label"] for each in records], odds)
    assert record["metrics"]["log_odds_roc_auc"]["value"] == pytest.approx(expected)
    (line,) = [line for line in results.describe(record) if "log_odds_roc_auc" in line]
    assert line.endswith("(at chance, 0.5)")


def test_samples_of_the_model_and_texts_that_it_writes(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [{"question": text} for text in WORDS[:5]])
    task = TaskConfig(
        **{"kind": "consistency", "path": path, "methods": ("samples",), "prompt": "{question}: ", "samples": 3},
        **{"write_text": True, "max_tokens": 6, "stop": ()},
    )
    record, lines = evaluate(tmp_path, make_loaded(), task)
    prompts = [make_model().encode_prompt(f"{text}:") for text in WORDS[:5]]
    assert [line["input"] for line in lines] == [t.strip() for t in make_model().generate(prompts, max_tokens=6)]
    surprises = [unigram_surprise(line["input"], line["samples"]) for line in lines]
    assert [line["sample_nats"] for line in lines] == surprises and len(lines[0]["samples"]) == 3
    assert len({text for line in lines for text in line["samples"]}) > 5
    assert record["main"] == "sample_nats" and record["metrics"]["sample_nats"]["value"] == np.mean(surprises)
    assert record["chance_levels"] == {}


@pytest.mark.parametrize(
    ("options", "record", "message"),
    [
        ({"methods": ("support",)}, {"text": "a"}, r"pair_field: .* has no 'source'; name one of its fields: text"),
        ({}, {"text": "a", "source": "b", "label": "maybe"}, "has the unknown label 'maybe'; expected one of 0, false"),
        (
            {"label_field": "human"},
            {"text": "a", "source": "b"},
            "has no 'human'; name one of its fields: text, source",
        ),
        (
            {"write_text": True, "prompt": "{source}"},
            {"source": "b", "label": 1},
            "the labels in 'label' are of other texts",
        ),
    ],
)
def test_bad_records(tmp_path, options, record, message):
    path = write_records(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, make_loaded(), TaskConfig(kind="consistency", path=path, **options))


def test_mc1_and_mc2(tmp_path):
    records = [
        {"question": text, "best": WORDS[i - 1], "right": [WORDS[i - 2]], "wrong": f"{WORDS[i - 3]}; {WORDS[i - 4]};"}
        for i, text in enumerate(WORDS)
    ]
    fields = {"best_field": "best", "correct_field": "right", "incorrect_field": "wrong"}
    task = TaskConfig(
        kind="truthful", path=write_records(tmp_path / "a.jsonl", records), prompt="{question}=", **fields
    )
    record, lines = evaluate(tmp_path, make_loaded(), task)
    mc1, mc2 = [], []
    for i, text in enumerate(WORDS):
        best, other, *wrong = (log_likelihood(f"{text}=", WORDS[i - j].strip()) for j in (1, 2, 3, 4))
        mc1.append(best > max(wrong))
        mc2.append((math.exp(best) + math.exp(other)) / sum(map(math.exp, (best, other, *wrong))))
    assert [line["mc2"] for line in lines] == pytest.approx(mc2, rel=1e-2)
    assert record["metrics"]["mc1"]["value"] == np.mean(mc1) == np.mean([line["mc1"] for line in lines])
    assert record["chance_levels"] == {"mc1": pytest.approx(1 / 3), "mc2": 0.5}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"best_answer": "a", "correct_answers": "a"}, "has no 'incorrect_answers'"),
        ({"best_answer": "a", "correct_answers": "a", "incorrect_answers": " ; "}, "has no answers there; add one"),
        ({"best_answer": "a", "correct_answers": ["a", "b"], "incorrect_answers": ["b"]}, "'b' as correct and as inc"),
        ({"best_answer": " ", "correct_answers": ["a"], "incorrect_answers": ["b"]}, "best_answer.* has no text there"),
    ],
)
def test_bad_answers_of_truthful(tmp_path, record, message):
    path = write_records(tmp_path / "a.jsonl", [{"question": "q", **record}])
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, make_loaded(), TaskConfig(kind="truthful", path=path))


def test_stereotypes_by_category(tmp_path):
    records = [{"sent_more": WORDS[i], "sent_less": WORDS[-1 - i], "bias_type": "ab"[i % 2]} for i in range(12)]
    path = write_records(tmp_path / "a.jsonl", records)
    record, lines = evaluate(
        tmp_path, make_loaded(), TaskConfig(kind="stereotypes", path=path, group_field="bias_type")
    )
    gaps = np.array([log_likelihood("", each["sent_more"]) - log_likelihood("", each["sent_less"]) for each in records])
    assert [line["nats_gap"] for line in lines] == pytest.approx(gaps.tolist(), rel=1e-3, abs=1e-3)
    for name, chosen in (("", gaps), ("/a", gaps[::2]), ("/b", gaps[1::2])):
        for metric, expected in (("nats_gap", chosen.mean()), ("prefers_stereotype", np.mean(chosen > 0))):
            number = record["metrics"][metric + name]
            assert number["value"] == pytest.approx(expected, rel=1e-3) and number["low"] <= number["high"]
