"""Tasks on real models: predictions, scores of known models, each example once, and the files that are written."""

import json
import math
from typing import Any
import xml.etree.ElementTree

import numpy as np
import pytest
import sacrebleu
from sklearn import metrics as sklearn

from llmjax.cli.evaluate import evaluate as evaluate_command
from llmjax.errors import UserError
from llmjax.evals.classification import fit_temperature, log_losses, softmax, split_halves
from llmjax.evals.config import TaskConfig
from llmjax.evals.results import Options
from llmjax.evals.tasks import run
from llmjax.evals.text_scores import token_f1
from llmjax.inference.predict import predict
from llmjax.parallel import axes
from llmjax.run import config as run_config
from tests.evals.tasks.models import CLASSES, evaluate, make_loaded, make_model, write_records
from tests.serve import runs
from tests.train.trainer import one_device

RNG = np.random.default_rng(0)
WORDS = ["".join(RNG.choice(list("abcdefgh "), size)) for size in RNG.integers(3, 30, 24)]
VOCAB = runs.make_config().model.vocab_size


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules):
        yield


def value(record: dict, name: str) -> float:
    """A metric, which lies in its interval."""
    metric = record["metrics"][name]
    assert metric["low"] - 1e-9 <= metric["value"] <= metric["high"] + 1e-9
    return metric["value"]


def log_likelihood(text: str, continuation: str) -> float:
    """Of the bytes of a continuation, by one request alone."""
    context = make_model().encode_prompt(text)
    return make_model().loglikelihoods([(context, list(continuation.encode()))])[0][0]


@pytest.mark.parametrize("answer", ["number", "letter", "text"])
def test_choice_takes_the_likeliest_text(tmp_path, answer):
    records = [
        {"question": WORDS[i], "choices": [WORDS[i + 1], "x", WORDS[i + 2][:4]], "answer": i % 3} for i in range(12)
    ]
    if answer != "number":
        for record in records:
            number = record["answer"]
            record["answer"] = "ABC"[number] if answer == "letter" else record["choices"][number]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="choice", path=path, shots=2, normalize="bytes", prompt="Q:{question}=", limit=7)
    record, lines = evaluate(tmp_path, make_loaded(), task)
    assert (record["task"], record["step"], record["n"], record["main"]) == ("mine", 0, 7, "acc_bytes")
    assert [line["index"] for line in lines] == list(range(7))
    assert record["chance"] == pytest.approx(1 / 3)
    texts = [f"Q:{each['question']}=" for each in records]
    shots = "".join(f"{texts[i]}{records[i]['choices'][i]}\n\n" for i in range(2))
    right = {"acc": [], "acc_bytes": []}
    for line, each, text in zip(lines, records[2:], texts[2:], strict=False):
        nats = np.array([log_likelihood(shots + text, choice) for choice in each["choices"]])
        np.testing.assert_allclose(line["nats"], nats, rtol=1e-4)
        per_byte = nats / [len(choice) for choice in each["choices"]]
        assert line["input"] == text and line["prediction"] == each["choices"][per_byte.argmax()]
        right["acc"].append(each["choices"][nats.argmax()] == line["target"])
        right["acc_bytes"].append(line["prediction"] == line["target"])
    for name, values in right.items():
        assert value(record, name) == pytest.approx(np.mean(values))
    # The tokens are bytes.
    assert record["metrics"]["acc_tokens"] == record["metrics"]["acc_bytes"]


def test_choices_by_template_and_the_first_as_the_answer(tmp_path):
    records = [{"question": WORDS[i], "one": WORDS[i + 1], "two": WORDS[i + 2]} for i in range(8)]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="choice", path=path, choices=("{one}", "not {two}"), answer_field="")
    record, lines = evaluate(tmp_path, make_loaded(), task)
    assert [line["choices"] for line in lines] == [[each["one"], f"not {each['two']}"] for each in records]
    assert value(record, "acc") == np.mean([line["target"] == line["prediction"] for line in lines])


def test_a_uniform_model_has_known_scores(tmp_path):
    """As many nats a byte for every text: log of the vocabulary."""
    texts = [*WORDS, "ü" * 40, "long " * 60]
    path = write_records(tmp_path / "a.jsonl", [{"text": text, "kind": text[0]} for text in texts])
    task = TaskConfig(kind="perplexity", path=path, group_field="kind")
    record, lines = evaluate(tmp_path, make_loaded(scale=0.0), task)
    assert record["bytes"] == record["tokens"] == sum(len(text.encode()) for text in texts)
    expected = {"bits_per_byte": math.log2(VOCAB), "perplexity": VOCAB}
    assert {name.partition("/")[2] for name in record["metrics"]} > {
        "ü",
        "length 256-1023 bytes",
        "position 64-255 tokens",
    }
    for name in record["metrics"]:
        assert value(record, name) == pytest.approx(expected[name.partition("/")[0]], rel=1e-5)
    assert [line["bits_per_byte"] for line in lines] == pytest.approx([math.log2(VOCAB)] * len(texts), rel=1e-5)
    pairs = [{"good": text, "bad": text[::-1]} for text in WORDS] + [{"good": "a", "bad": "bc"}]
    task = TaskConfig(kind="pairs", path=write_records(tmp_path / "b.jsonl", pairs))
    record, _ = evaluate(tmp_path, make_loaded(scale=0.0), task)
    assert value(record, "acc") == (len(WORDS) / 2 + 1) / (len(WORDS) + 1)
    assert value(record, "nats_difference") == pytest.approx(math.log(VOCAB) / len(pairs), rel=1e-4)


def test_perplexity_by_position_and_group(tmp_path):
    records = [{"text": text, "domain": "ab"[number % 2]} for number, text in enumerate(WORDS)]
    task = TaskConfig(kind="perplexity", path=write_records(tmp_path / "a.jsonl", records), group_field="domain")
    record, lines = evaluate(tmp_path, make_loaded(), task)
    nats = [-values for values in make_model().rolling_tokens([list(text.encode()) for text in WORDS])]
    assert [line["nats"] for line in lines] == pytest.approx([each.sum() for each in nats], rel=1e-6)
    for name, chosen in (("", nats), ("/a", nats[::2]), ("/b", nats[1::2])):
        assert value(record, f"perplexity{name}") == pytest.approx(np.exp(np.concatenate(chosen).mean()), rel=1e-5)
    later = np.concatenate([each[16:] for each in nats])
    assert value(record, "perplexity/position 16-63 tokens") == pytest.approx(np.exp(later.mean()), rel=1e-5)


def test_pairs_by_group(tmp_path):
    records = [{"right": WORDS[i], "wrong": WORDS[-1 - i], "area": ["x", "y"][i % 2]} for i in range(12)]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="pairs", path=path, good_field="right", bad_field="wrong", group_field="area")
    record, lines = evaluate(tmp_path, make_loaded(), task)
    differences = [log_likelihood("", each["right"]) - log_likelihood("", each["wrong"]) for each in records]
    assert [line["nats_difference"] for line in lines] == pytest.approx(differences, rel=1e-4, abs=1e-3)
    assert value(record, "nats_difference") == pytest.approx(np.mean(differences), rel=1e-4)
    for name, chosen in (("", differences), ("/x", differences[::2]), ("/y", differences[1::2])):
        assert value(record, f"acc{name}") == np.mean(np.array(chosen) > 0)
    assert record["groups"] == {"x": 6, "y": 6}


def test_generate(tmp_path):
    records = [{"question": text, "answer": ["nothing", text[:2]]} for text in WORDS[:4]]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="generate", path=path, max_tokens=5, stop=("a",), prompt="{question}: ")
    record, lines = evaluate(tmp_path, make_loaded(), task)
    for line, each in zip(lines, records, strict=True):
        prompt = make_model().encode_prompt(f"{each['question']}:")
        (text,) = make_model().generate([prompt], stop=("a",), max_tokens=5)
        assert line["prediction"] == text.strip() and "a" not in text
        assert line["token_f1"] == token_f1(text, each["answer"])
    assert value(record, "token_f1") == np.mean([line["token_f1"] for line in lines])
    records = [{"question": line["input"][:-2], "answer": line["prediction"]} for line in lines]
    write_records(tmp_path / "a.jsonl", records)
    assert value(evaluate(tmp_path, make_loaded(), task)[0], "exact_match") == 1


def test_further_metrics_of_generated_texts(tmp_path):
    records = [{"question": text, "answer": [text, text[:4]], "area": "xy"[n % 2]} for n, text in enumerate(WORDS[:6])]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(
        **{"kind": "generate", "path": path, "max_tokens": 8, "stop": (), "group_field": "area", "shots": 1},
        metrics=("chrf", "rougeL", "bleu"),
    )
    record, lines = evaluate(tmp_path, make_loaded(), task)
    assert record["main"] == next(iter(record["metrics"])) == "chrf"
    texts, right = [line["prediction"] for line in lines], [line["target"] for line in lines]
    expected = sacrebleu.corpus_chrf(texts, list(zip(*right, strict=True))).score
    assert value(record, "chrf") == pytest.approx(expected)
    assert value(record, "chrf/x") == pytest.approx(
        sacrebleu.corpus_chrf(texts[1::2], list(zip(*right[1::2], strict=True))).score
    )
    assert value(record, "rougeL") == pytest.approx(np.mean([line["rougeL"] for line in lines]))
    assert 0 <= value(record, "bleu") <= 100 and "nrefs:" in record["signatures"]["bleu"]
    write_records(tmp_path / "a.jsonl", [*records, {"question": "a", "answer": "", "area": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl:7 has no text there, and chrf, rougeL, bleu need a reference"):
        evaluate(tmp_path, make_loaded(), task)


def test_a_head_for_classes(tmp_path):
    loaded = make_loaded("classify")
    records = [{"text": text, "label": int(RNG.integers(3)), "from": text[0]} for text in WORDS]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="classify", path=path, labels=("0", "1", "2"), group_field="from")
    record, lines = evaluate(tmp_path, loaded, task)
    labels, _ = predict(loaded, [(text, None) for text in WORDS])
    assert [line["prediction"] for line in lines] == [label["label"] for label in labels]
    probabilities = np.array([list(line["probabilities"].values()) for line in lines])
    np.testing.assert_allclose(probabilities, [list(label["probabilities"].values()) for label in labels], rtol=1e-9)
    actual, predicted = [line["target"] for line in lines], [line["prediction"] for line in lines]
    assert actual == [CLASSES[each["label"]] for each in records]
    report = sklearn.classification_report(actual, predicted, labels=CLASSES, output_dict=True, zero_division=0)
    for name in CLASSES:
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert record["metrics"][f"{ours}/{name}"]["value"] == pytest.approx(report[name][theirs])
    assert value(record, "accuracy") == pytest.approx(report["accuracy"])
    assert value(record, "log_loss") == pytest.approx(sklearn.log_loss(actual, probabilities, labels=CLASSES))
    assert value(record, "roc_auc") == pytest.approx(sklearn.roc_auc_score(actual, probabilities, multi_class="ovr"))
    np.testing.assert_array_equal(record["confusion"], sklearn.confusion_matrix(actual, predicted, labels=CLASSES))
    of_a = [line["accuracy"] for line, each in zip(lines, records, strict=True) if each["from"] == "a"]
    assert value(record, "accuracy/a") == np.mean(of_a)
    by_group = {name: number["value"] for name, number in record["metrics"].items() if name.startswith("accuracy/")}
    assert value(record, "accuracy_gap") == max(by_group.values()) - min(by_group.values())
    # Each half at the temperature of the other half.
    numbers, logits, losses = np.array([each["label"] for each in records]), np.log(probabilities), []
    halves = split_halves(numbers)
    for half, other in ((halves == 0, halves == 1), (halves == 1, halves == 0)):
        temperature = fit_temperature(numbers[other], logits[other])
        losses.append(log_losses(numbers[half], softmax(logits[half], temperature)))
    assert value(record, "log_loss_scaled") == pytest.approx(np.concatenate(losses).mean(), rel=1e-6)
    plot = xml.etree.ElementTree.parse(tmp_path / "eval" / "0" / "mine.svg").getroot()
    bars = [element for element in plot.iter() if element.get("class") == "bar"]
    assert len(bars) == np.count_nonzero(record["reliability"]["counts"])


def test_classes_by_the_likelihood_of_their_names(tmp_path):
    records = [{"text": text, "label": ["no", "yes"][len(text) % 2]} for text in WORDS]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="classify", path=path, choices=("false", "true"), labels=("no", "yes"), shots=1)
    record, lines = evaluate(tmp_path, make_loaded(), task)
    assert len(lines) == len(WORDS) - 1
    shot = f"{WORDS[0]} {['false', 'true'][len(WORDS[0]) % 2]}\n\n"
    for line, text in zip(lines[:3], WORDS[1:], strict=False):
        nats = [log_likelihood(shot + text, f" {choice}") for choice in ("false", "true")]
        assert line["probabilities"]["true"] == pytest.approx(1 / (1 + math.exp(nats[0] - nats[1])), rel=1e-3)
    assert value(record, "accuracy") == np.mean([line["target"] == line["prediction"] for line in lines])


def test_a_head_for_numbers(tmp_path):
    loaded = make_loaded("regress")
    records = [{"first": text, "score": round(float(RNG.normal()), 2)} for text in WORDS]
    path = write_records(tmp_path / "a.jsonl", records)
    task = TaskConfig(kind="regress", path=path, text_field="first", label_field="score")
    record, lines = evaluate(tmp_path, loaded, task)
    predicted = np.array([label["label"] for label in predict(loaded, [(text, None) for text in WORDS])[0]])
    actual = np.array([each["score"] for each in records])
    assert [line["prediction"] for line in lines] == pytest.approx(predicted.tolist())
    assert value(record, "pearson") == pytest.approx(np.corrcoef(predicted, actual)[0, 1])
    assert value(record, "rmse") == pytest.approx(np.sqrt(np.mean((predicted - actual) ** 2)))


def test_a_task_is_scored_again_only_if_it_changed(tmp_path):
    records = [{"good": "one", "bad": "two"}] * 3
    task = TaskConfig(kind="pairs", path=write_records(tmp_path / "a.jsonl", records))
    loaded = make_loaded()
    first, _ = evaluate(tmp_path, loaded, task)

    def fail():
        raise AssertionError("the model was asked again")

    assert run.evaluate(tmp_path, loaded, "mine", task, make_model=fail) == first
    write_records(tmp_path / "a.jsonl", records[:2])
    assert evaluate(tmp_path, loaded, task)[0]["n"] == 2


def select(objective: str, options: Options | None = None, name: str = "mine", **task) -> dict[str, TaskConfig]:
    config = make_loaded(objective).config
    fields = [(f"eval.tasks.mine.{field}", text) for field, text in {"path": "a.jsonl", **task}.items()]
    config = run_config.apply_overrides(run_config.to_json(config), fields)
    return run.select_tasks(config, [name], options or Options())


def test_options_of_the_command_replace_those_of_the_task():
    task = select("causal", Options(limit=5, shots=2), kind="choice", limit="9", shots="3")["mine"]
    assert (task.limit, task.shots) == (5, 2)
    task = select("causal", kind="choice", limit="9", shots="3")["mine"]
    assert (task.limit, task.shots) == (9, 3)


@pytest.mark.parametrize(
    ("objective", "task", "message"),
    [
        (
            "causal",
            {"kind": "regress"},
            "kind='regress': needs a run with objective.name='regress', and this one has 'c",
        ),
        ("causal", {"kind": "classify"}, "choices is not set: the run has no head for classes"),
        ("classify", {"kind": "choice"}, "objective.name='classify' gives no likelihood of text; use kind='classify'"),
        ("classify", {"kind": "classify", "shots": "2"}, "shots=2: the run has a head for labels"),
        ("classify", {"kind": "classify", "labels": "('a', 'b')"}, "one for each of data.classes .bad, fair, good"),
        ("classify", {"kind": "classify", "pair_field": "b"}, "pair_field='b': the model was trained on single texts"),
        ("regress", {"kind": "classify"}, "objective.name='regress' gives no likelihood of text; use kind='regress'"),
    ],
)
def test_tasks_that_a_run_cannot_have(objective, task, message):
    with pytest.raises(UserError, match=message):
        select(objective, **task)


def test_tasks_that_a_family_cannot_have():
    tasks = {name: {"kind": name, "path": "a.jsonl"} for name in ("pairs", "choice", "generate")}
    tasks |= {"memorised": {"kind": "memorisation"}}

    def select(family: str, objective: str, name: str, **options: Any):
        tree = {"model": {"family": family}, "objective": {"name": objective}, "eval": {"tasks": tasks}}
        return run.select_tasks(run_config.apply_overrides(tree, []), [name], Options(**options))

    with pytest.raises(UserError, match=r"kind='pairs': model\.family='encoder' gives no likelihood of text"):
        select("encoder", "masked", "pairs")
    with pytest.raises(
        UserError, match=r"memorised\.kind='memorisation': the decoder of model\.family='encdec' does not"
    ):
        select("encdec", "span", "memorised")
    with pytest.raises(UserError, match=r"chat=True: model\.family='encdec' reads prompts without a chat template"):
        select("encdec", "span", "generate", chat=True)
    assert all(select("encdec", "span", name) for name in ("pairs", "choice", "generate"))


def test_bad_options_of_the_command():
    with pytest.raises(
        UserError, match=r"task 'mien' \(did you mean 'mine'\?\): the config has no such task \(it has: mine"
    ):
        select("causal", name="mien", kind="pairs")
    with pytest.raises(UserError, match="chat=True: kind='pairs' does not use it"):
        select("causal", Options(chat=True), kind="pairs")
    with pytest.raises(UserError, match="shots=3: kind='pairs' does not use it"):
        select("causal", Options(shots=3), kind="pairs")


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        (
            {"kind": "choice"},
            {"question": "a", "choices": ["b", "c"], "answer": "d"},
            r"has the answer 'd'; give the text",
        ),
        ({"kind": "choice"}, {"question": "a", "choices": ["b", "c"], "answer": 2}, "has the answer 2; give the text"),
        ({"kind": "choice"}, {"question": "a", "choices": ["b"], "answer": 0}, "expected two or more texts"),
        ({"kind": "classify", "choices": ("yes", "no")}, {"text": "a", "label": "y"}, "has the unknown label 'y'"),
        ({"kind": "stereotypes"}, {"sent_more": "a"}, r"other_field: .* has no 'sent_less'; name one of its fields"),
        ({"kind": "generate"}, {"question": "a", "answer": []}, "answer_field: .* has an empty list in 'answer'"),
    ],
)
def test_bad_answers(tmp_path, task, record, message):
    path = write_records(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, make_loaded(), TaskConfig(path=path, **task))


@pytest.mark.parametrize("kind", ["choice", "generate", "classify"])
def test_the_chat_template_writes_prompts_and_shots(tmp_path, kind):
    options = {
        "choice": {"choices": ("ab", "c"), "answer_field": "label"},
        "generate": {"answer_field": "label", "max_tokens": 4, "stop": ("never",)},
        "classify": {"text_field": "question", "choices": ("ab", "c")},
    }[kind]
    path = write_records(tmp_path / "a.jsonl", [{"question": f"q{i}", "label": ("ab", "c")[i % 2]} for i in range(4)])
    task = TaskConfig(kind=kind, path=path, shots=1, chat=True, **options)
    with pytest.raises(UserError, match="it has no chat template; import a chat model"):
        evaluate(tmp_path, make_loaded(), task)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(runs.TEMPLATE)
    _, lines = evaluate(tmp_path, make_loaded(), task)
    shot = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "ab"}]
    texts = [runs.CHAT.render([*shot, {"role": "user", "content": f"q{i}"}]) for i in range(1, 4)]
    assert [line["prompt"] for line in lines] == texts and texts[0] == "<user>q0\n<assistant>ab\n<user>q1\n<assistant>"
    if kind == "generate":
        new = make_model().generate([make_model().encode_prompt(text) for text in texts], max_tokens=4)
        assert [line["prediction"] for line in lines] == [text.strip() for text in new] and any(new)
        return
    for line, text in zip(lines, texts, strict=True):
        nats = [log_likelihood(text, choice) for choice in ("ab", "c")]
        found = line["nats"] if kind == "choice" else np.log(list(line["probabilities"].values()))
        np.testing.assert_allclose(np.diff(found), np.diff(nats), rtol=1e-4)


def test_the_command(tmp_path, capfd):
    workdir = runs.write_run(tmp_path / "run")
    path = write_records(tmp_path / "a.jsonl", [{"good": text, "bad": text[::-1]} for text in WORDS])
    overrides = [f"--config.eval.tasks.mine.{name}={text}" for name, text in (("kind", "pairs"), ("path", path))]
    assert evaluate_command([f"--workdir={workdir}", "--tasks=mine", "--limit=5", "--batch=8", *overrides]) == 0
    record = json.loads((tmp_path / "run" / "eval" / "0" / "mine.json").read_text())
    assert record["n"] == 5 and record["settings"]["limit"] == 5
    with pytest.raises(UserError, match=r"task 'other': the config has no such task \(it has: none\)"):
        evaluate_command([f"--workdir={workdir}", "--tasks=other"])
