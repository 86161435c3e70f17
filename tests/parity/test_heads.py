"""Classes without a head, or with another one: what transformers saves is imported, and what is exported it loads."""

import json

import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from etils import epath
from flax import nnx
import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.cli import main
from llmjax.inference.predict import predict
from llmjax.interop import exporting, importing
from llmjax.run import loading
from tests import jobs
from tests.parity.test_interop import BERT, GPT2, LLAMA, T5, VOCAB, random_ids, rows, same_state, save

MODERN = {**LLAMA, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
# class -> (config's class, settings, what is initialized, what is left out, class that is exported)
CLASSES = {
    "BertModel": ("Bert", BERT, "head", "", "BertModel"),
    "BertForPreTraining": ("Bert", BERT, "", "cls.seq_relationship.bias", "BertForMaskedLM"),
    "ModernBertModel": ("ModernBert", MODERN, "head", "", "ModernBertModel"),
    "ModernBertForSequenceClassification": ("ModernBert", MODERN, "head", "classifier.bias", "ModernBertModel"),
    "GPT2Model": ("GPT2", GPT2, "", "", "GPT2Model"),
    "LlamaModel": ("Llama", {**LLAMA, "num_key_value_heads": 2}, "head", "", "LlamaModel"),
    "LlamaForTokenClassification": ("Llama", {**LLAMA, "pad_token_id": 0}, "head", "score.bias", "LlamaModel"),
    "T5EncoderModel": ("T5", T5, "decoder", "", "T5EncoderModel"),
}


def build(name: str):
    kind, settings, *_ = CLASSES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, attn_implementation="eager", **settings)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def hidden_states(loaded, ids: np.ndarray) -> np.ndarray:
    model, batch = nnx.merge(loaded.graph, loaded.params), rows(ids)
    if loaded.config.model.reads_source:
        names = ("source", "source_segments", "source_positions")
        batch = rows(ids, **dict(zip(names, (batch.inputs, batch.segments, batch.positions), strict=True)))
        return np.asarray(jax.jit(type(model).encode)(model, batch))
    return np.asarray(jax.jit(lambda model, batch: model(batch).hidden)(model, batch))


@pytest.mark.parametrize("name", CLASSES)
def test_class(name, tmp_path, caplog):
    _, _, initialized, left_out, exported_class = CLASSES[name]
    model, ids, workdir = build(name), random_ids((2, 16)), epath.Path(tmp_path / "run")
    body = getattr(model, model.base_model_prefix, model) if not name.endswith("Model") else model
    with caplog.at_level("INFO"):
        imported = importing.import_checkpoint(
            save(model, tmp_path / "in", special=("[PAD]", "[CLS]", "[SEP]")), workdir
        )
    assert imported.architecture == name
    notes = [record.message for record in caplog.records if "note" in record.message]
    assert any(f"none: {initialized} (" in note for note in notes) is bool(initialized)
    assert any(f"no such head: {left_out}" in note for note in notes) is bool(left_out)
    with torch.no_grad():
        expected = body(input_ids=torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()
    with loading.load(workdir) as loaded:
        np.testing.assert_allclose(hidden_states(loaded, ids), expected, atol=2e-5 * max(1, np.abs(expected).max()))
    exported = exporting.export(workdir, tmp_path / "out")
    assert exported.architecture == exported_class
    back, info = getattr(transformers, exported_class).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if exported_class == name:
        same_state(model, back)
    with torch.no_grad():
        again = back.base_model(input_ids=torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()
    np.testing.assert_allclose(again, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_the_pooler_of_bert_is_kept(tmp_path):
    model, workdir = build("BertModel"), epath.Path(tmp_path / "run")
    importing.import_checkpoint(save(model, tmp_path / "in", special=("[PAD]", "[CLS]", "[SEP]")), workdir)
    ids = random_ids((2, 16))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids, dtype=torch.long)).pooler_output.numpy()
    with loading.load(workdir) as loaded:
        actual = nnx.merge(loaded.graph, loaded.params).pool(hidden_states(loaded, ids))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


NAMES = {"id2label": {0: "good", 1: "bad", 2: "ugly"}, "label2id": {"good": 0, "bad": 1, "ugly": 2}}
# class -> settings, problem_type, what the run predicts
CLASSIFIERS = {
    "BertForSequenceClassification": ({**BERT, **NAMES}, None, "classify"),
    "GPT2ForSequenceClassification": ({**GPT2, "pad_token_id": 0, "num_labels": 1}, "regression", "regress"),
    "LlamaForSequenceClassification": ({**LLAMA, "pad_token_id": 0}, None, "classify"),
    "Qwen3ForSequenceClassification": (
        {**LLAMA, **NAMES, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0},
        "multi_label_classification",
        "classify",
    ),
    "MixtralForSequenceClassification": (
        {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0},
        None,
        "classify",
    ),
}


def head_outputs(loaded, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Outputs of the head at the scored position of each padded row."""
    is_token = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32)
    batch = Batch(
        inputs=ids * is_token,
        targets=ids,
        weights=is_token.astype(np.float32),
        segments=is_token,
        positions=np.arange(ids.shape[1], dtype=np.int32) * is_token,
        sample=np.zeros((len(ids), 2), np.uint32),
    )
    at = np.zeros_like(lengths) if loaded.config.model.bidirectional else lengths - 1

    def run(params, batch):
        model = nnx.merge(loaded.graph, params)
        return model.unembed(model(batch).hidden[np.arange(len(ids)), at])

    return np.asarray(jax.jit(run)(loaded.params, batch))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_for_labels_is_kept_in_both_directions(name, tmp_path):
    settings, problem, objective = CLASSIFIERS[name]
    torch.manual_seed(0)
    kind = name.removesuffix("ForSequenceClassification")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB, attn_implementation="eager", problem_type=problem, **settings
    )
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.eval()
    workdir, ids, lengths = epath.Path(tmp_path / "run"), random_ids((3, 16)), np.array([16, 9, 12])
    importing.import_checkpoint(save(model, tmp_path / "in", special=("[PAD]", "[CLS]", "[SEP]")), workdir)
    mask = np.arange(16) < lengths[:, None]
    inputs = {
        "input_ids": torch.tensor(np.where(mask, ids, 0), dtype=torch.long),
        "attention_mask": torch.tensor(mask, dtype=torch.long),
    }
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    with loading.load(workdir) as loaded:
        assert loaded.config.objective.name == objective
        assert loaded.config.data.multi_label == (problem == "multi_label_classification")
        np.testing.assert_allclose(head_outputs(loaded, ids, lengths), expected, atol=2e-4)
    assert exporting.export(workdir, tmp_path / "out").architecture == name
    back = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert type(back) is type(model)
    same_state(model, back)
    assert back.config.id2label == model.config.id2label and back.config.label2id == model.config.label2id
    with torch.no_grad():
        np.testing.assert_allclose(back(**inputs).logits.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM"])
def test_a_trained_head_predicts_the_same_in_transformers(name, tmp_path):
    kind = {"BertModel": "Bert", "LlamaForCausalLM": "Llama"}[name]
    torch.manual_seed(0)
    settings = {**BERT, "max_position_embeddings": 64} if kind == "Bert" else {**LLAMA, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, attn_implementation="eager", **settings)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if kind == "Bert" else ("<unk>", "<s>", "</s>")
    source, workdir = save(getattr(transformers, name)(config), tmp_path / "in", special), tmp_path / "run"
    importing.import_checkpoint(source, epath.Path(workdir))
    texts = ["def main", "return argv", "if argument in argv", "x", "[argument]", "for main in def:"] * 10
    records = [{"text": text, "label": "long" if len(text) > 10 else "short"} for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "data.sources.main.path": tmp_path / "a.jsonl",
        "data.sources.main.split": "train",
        "data.classes": "('short', 'long')",
        "data.seq_len": 64,
        "data.workers": 1,
        "train.steps": 8,
        "train.global_batch": 8,
        "train.log_every": 4,
        "optimizer.learning_rate": "0.003",
        "optimizer.warmup_steps": 1,
        "eval.every": 0,
    }
    overrides = [f"--config.{field}={value}" for field, value in settings.items()]
    run_config = f"--config={jobs.ROOT / 'configs' / 'classify.py'}:classes"
    assert main.run(["train", run_config, f"--workdir={workdir}", *overrides]) == 0
    exported = exporting.export(epath.Path(workdir), tmp_path / "out")
    assert exported.architecture == f"{kind}ForSequenceClassification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert back.config.id2label == {0: "short", 1: "long"} and back.config.problem_type == "single_label_classification"
    tokenizer.pad_token_id = back.config.pad_token_id
    batch = tokenizer(texts[:6], return_tensors="pt", padding=True)
    with loading.load(epath.Path(workdir)) as loaded, torch.no_grad():
        labels, _ = predict(loaded, [(text, None) for text in texts[:6]])
        expected = torch.softmax(back(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, -1).numpy()
    actual = [[label["probabilities"][name] for name in ("short", "long")] for label in labels]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 1e-3, "predictions of texts differ"
