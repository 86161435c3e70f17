"""Predicted labels agree with the evaluation, and do not depend on the other texts; a run starts from an import."""

import json

from etils import epath
import jax
import numpy as np
import pytest

from llmjax.cli.predict import predict as predict_command
from llmjax.cli.train import train as train_command
from llmjax.errors import UserError
from llmjax.inference.predict import predict
from llmjax.run import loading
from tests import jobs

MODEL = {
    **jobs.ONE_LAYER,
    "data.seq_len": 48,
    "train.steps": 30,
    "train.global_batch": 8,
    "checkpoint.every": 15,
    "optimizer.learning_rate": "0.01",
    "optimizer.weight_decay": 0,
}


HEADS = [("encoder", "classify"), ("encoder", "regress")]
ENCDEC = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.model = dict(family="encdec")
    c.objective = dict(name="classify")
    c.data = dict(sources=dict(main=dict(path="", label_field="label")))
    return c
"""


def write_records(path, kind: str, count: int = 200) -> None:
    """Texts of two letters; the label is which of them is more frequent, both lists of letters, or the share of one."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(count):
            letters = rng.choice(["a", "b"], rng.integers(3, 20), p=rng.permutation([0.2, 0.8]))
            share = float((letters == "a").mean())
            label = {"classify": "mostly a" if share > 0.5 else "mostly b", "regress": share}[kind]
            file.write(json.dumps({"text": "".join(letters), "label": label}) + "\n")


@pytest.fixture(
    scope="module", params=[*HEADS, pytest.param(("encdec", "classify"), marks=pytest.mark.slow)], ids="-".join
)
def trained(request, tmp_path_factory):
    """A workdir that was trained to predict labels, and their kind."""
    family, kind = request.param
    root = tmp_path_factory.mktemp(f"{family}-{kind}")
    write_records(root / "a.jsonl", kind)
    settings = {**MODEL, "data.sources.main.path": root / "a.jsonl", "model.family": family}
    if kind == "classify":
        settings["data.classes"] = "('mostly a', 'mostly b')"
    config = f"{jobs.ROOT / 'configs' / 'classify.py'}:{'classes' if kind == 'classify' else 'number'}"
    if family == "encdec":
        (root / "config.py").write_text(ENCDEC)
        config, settings["train.global_batch"] = root / "config.py", 16
    else:
        settings["model.max_positions"] = 48
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    assert train_command([f"--config={config}", f"--workdir={root / 'run'}", *overrides]) == 0
    return root, kind


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_agree_with_the_evaluation(trained):
    root, kind = trained
    workdir, output = root / "run", root / "labels.jsonl"
    assert predict_command([f"--workdir={workdir}", f"--input={root / 'a.jsonl'}", f"--output={output}"]) == 0
    records, labels = read_lines(root / "a.jsonl"), read_lines(output)
    scores = json.loads((workdir / "eval" / "30" / "validation.json").read_text())["total"]
    assert scores["perplexity"] is None and scores["bits_per_byte"] is None
    if kind == "classify":
        right = np.mean([record["label"] == label["label"] for record, label in zip(records, labels, strict=True)])
        assert right > 0.9 and scores["accuracy"] > 0.8 and scores["macro_f1"] > 0.8
        assert scores["accuracy"] > scores["baseline_accuracy"]
        for label in labels:
            assert sum(label["probabilities"].values()) == pytest.approx(1, abs=1e-12)
            assert max(label["probabilities"], key=label["probabilities"].get) == label["label"]
    else:
        pairs = zip(records, labels, strict=True)
        assert np.corrcoef([(record["label"], label["label"]) for record, label in pairs], rowvar=False)[0, 1] > 0.9
        assert scores["accuracy"] is None and scores["pearson"] > 0.8 and scores["spearman"] > 0.7
    with pytest.raises(UserError, match="already exists"):
        predict_command([f"--workdir={workdir}", f"--input={root / 'a.jsonl'}", f"--output={output}"])


def test_a_prediction_does_not_depend_on_the_other_texts(trained):
    root, _ = trained
    texts = [("ab" * size, None) for size in (1, 3, 10, 30)]
    with loading.load(epath.Path(root / "run")) as loaded:
        together, cut = predict(loaded, [*texts, *texts[::-1]])
        alone = [predict(loaded, [text])[0][0] for text in texts]
    assert cut == 2 and together[:4] == alone == together[:3:-1]


@pytest.mark.slow
@pytest.mark.parametrize("trained", HEADS, ids="-".join, indirect=True)
def test_a_resumed_run_equals_an_unbroken_one(trained, tmp_path):
    root, kind = trained
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    arguments = [f"--workdir={tmp_path / 'run'}", f"--config.data.store={root / 'run' / 'store'}"]
    config = json.loads((root / "run" / "config.json").read_text())
    (tmp_path / "run").mkdir()
    config["model"]["num_outputs"] = 0
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for stop in (15, 0):
        assert train_command([*arguments, f"--config.train.stop_at={stop}"]) == 0
        jax.clear_caches()
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    fields = ("step", "loss", "grad_norm", "batch_digest", "num_targets")
    assert [[line[field] for field in fields] for line in again[-1:]] == [[lines[-1][field] for field in fields]]
    assert ("accuracy" in lines[-1]) == (kind == "classify")
