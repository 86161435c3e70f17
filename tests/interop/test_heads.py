"""Classes without a head, or with another one, on folders written here; tests/parity/test_heads.py compares numbers."""

import json

from etils import epath
import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.interop import exporting, heads
from llmjax.models.encoder import EncoderConfig
from tests.interop import published
from tests.interop.test_import_export import round_trip


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForTokenClassification"])
def test_a_missing_head_is_initialized_and_another_one_left_out(tmp_path, name):
    tensors = published.random_tensors(published.llama_shapes(tied=True))
    without_prefix = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    stored = without_prefix if name == "LlamaModel" else tensors | published.random_tensors({"score.weight": (2, 32)})
    source = published.write_folder(tmp_path / "in", {**published.LLAMA, "architectures": [name]}, stored)
    _, exported, back = round_trip(source, tmp_path)
    record = json.loads((tmp_path / "run" / "import.json").read_text())
    assert record["initialized"] == ["head"]
    assert record["left_out"] == ([] if name == "LlamaModel" else ["score.weight"])
    assert exported.architecture == "LlamaModel" and set(back) == set(without_prefix)
    assert all(published.same_bits(back[key], tensor) for key, tensor in without_prefix.items())


CLASSIFIER = {**published.LLAMA, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": None}


def write_classifier(folder, **fields):
    count = len(fields.get("id2label", "ab"))
    shapes = published.llama_shapes(tied=True) | {"score.weight": (count, published.EMBED)}
    return published.write_folder(folder, {**CLASSIFIER, **fields}, published.random_tensors(shapes))


def test_a_head_for_labels_round_trips_bitwise_and_predicts(tmp_path, capsys):
    names = {"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "problem_type": "single_label_classification"}
    source = write_classifier(tmp_path / "in", **names)
    (source / "texts.jsonl").write_text('{"text": "return"}\n{"text": "def main"}\n')
    assert main.run(["import", f"--from={source}", f"--workdir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "the model predicts a class of no, yes, maybe" in printed and "next: llmjax predict" in printed
    files = [f"--input={source / 'texts.jsonl'}", f"--output={tmp_path / 'labels.jsonl'}"]
    assert main.run(["predict", f"--workdir={tmp_path / 'run'}", *files]) == 0
    labels = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [list(label["probabilities"]) for label in labels] == [["no", "yes", "maybe"]] * 2
    assert (
        exporting.export(epath.Path(tmp_path / "run"), tmp_path / "out").architecture == CLASSIFIER["architectures"][0]
    )
    before, after = published.read_tensors(source), published.read_tensors(tmp_path / "out")
    assert set(after) == set(before) and all(published.same_bits(after[name], before[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in names} == names and config["label2id"] == {"no": 0, "yes": 1, "maybe": 2}
    assert config["pad_token_id"] == 2 and not (tmp_path / "out" / "generation_config.json").exists()
    with pytest.raises(UserError, match="--format=gguf: LlamaForSequenceClassification is not supported"):
        exporting.export(epath.Path(tmp_path / "run"), tmp_path / "out.gguf", dtype="f32")


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, heads.Labels(("LABEL_0", "LABEL_1"), False)),
        ({"num_labels": 1}, heads.Labels((), False)),
        ({"id2label": {"1": "b", "0": "a"}}, heads.Labels(("a", "b"), False)),
        ({"id2label": {"0": "score"}, "problem_type": "regression"}, heads.Labels((), False)),
        (
            {"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"},
            heads.Labels(("a", "b"), True),
        ),
    ],
)
def test_labels_of_config_json(fields, labels):
    assert heads.read_labels(fields) == labels
    assert heads.read_labels(heads.write_labels(labels)) == labels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: expected the name of each label from 0 on"),
        ({"id2label": ["a", "b"]}, "id2label: expected the name of each label"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label gives two labels one name"),
        ({"id2label": {"0": "a", "1": 3}}, "id2label: expected the name of each label"),
        ({"num_labels": 0}, "num_labels=0: expected a number of labels"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is not known"),
        ({"problem_type": "regression"}, "problem_type='regression' of 2 numbers: only 1"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        heads.read_labels(fields)


def test_a_head_that_no_class_has_is_refused_by_name():
    sizes = {"vocab_size": 90, "num_layers": 2, "embed": 32, "num_heads": 4, "num_outputs": 3}
    bert = {"gated": False, "activation": "gelu", "norm_position": "post", "positions": "learned", "biases": "all"}
    with pytest.raises(UserError, match=r"model.pooler=False: a checkpoint of BertForSequenceClassification has"):
        exporting.choose_class(EncoderConfig(**sizes, **bert, token_types=2))
    name, *_ = exporting.choose_class(EncoderConfig(**sizes, **bert, token_types=2, pooler=True))
    assert name == "BertForSequenceClassification"
    modern = {"norm_position": "pre", "positions": "rotary", "gated": True, "activation": "gelu", "biases": "none"}
    with pytest.raises(UserError, match="ModernBertForSequenceClassification has further layers below its head"):
        exporting.choose_class(EncoderConfig(**sizes, **modern, token_types=0))
