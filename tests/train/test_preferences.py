"""DPO and reward models: trained by commands, with adapters, killed and resumed; meshes agree."""

import dataclasses
import json
import math

import numpy as np
import pytest

from llmjax.cli.evaluate import evaluate as eval_command
from llmjax.cli.predict import predict as predict_command
from llmjax.cli.train import train as train_command
from llmjax.data.batches.packing import Rows
from llmjax.data.config import DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.objectives.preference_batch import build_preference_batch
from llmjax.errors import UserError
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.pair_losses import choose_loss
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run.config import RunConfig, TrainConfig
from tests import jobs
from tests.train.trainer import ROWS, Trainer, one_device

SEQ, VOCAB = 32, 100
MODEL = DecoderConfig(vocab_size=VOCAB, num_layers=2, embed=32, num_heads=4, mlp=64)


def records(rows: int, first_sample: int = 0):
    """Random preferences with random log-likelihoods of the reference model."""
    rng = np.random.default_rng(first_sample)
    counts = rng.integers(1, 8, (rows, 3))
    targets, labels = np.zeros((rows, SEQ), np.int32), np.zeros((rows, SEQ, 3), np.float32)
    segments = (np.arange(SEQ) < counts.sum(axis=1)[:, None]).astype(np.int32)
    targets[:] = rng.integers(3, VOCAB, targets.shape) * segments
    labels[:, 0] = counts
    positions = np.arange(SEQ, dtype=np.int32) * segments
    reference = rng.normal(-20, 5, (rows, 2)).astype(np.float32)
    packed = Rows(
        targets=targets,
        inputs=targets,
        segments=segments,
        positions=positions,
        scored=segments > 0,
        labels=labels,
        reference=reference,
    )
    return build_preference_batch(packed, first_sample + np.arange(rows), SEQ)


@pytest.mark.parametrize("name", ["dpo", "reward"])
@pytest.mark.parametrize("mesh", ["data", pytest.param("tensor", marks=pytest.mark.slow), "pmap"])
def test_eight_devices_agree_with_one(mesh, name):
    model = dataclasses.replace(MODEL, num_outputs=int(name == "reward"))
    optimizer, loss = OptimizerConfig(learning_rate=1e-2, warmup_steps=1), choose_loss(ObjectiveConfig(name=name))
    sizes = {"data": dict(data=8), "pmap": dict(data=8), "tensor": dict(data=2, fsdp=2, tensor=2)}[mesh]
    steps = {}
    for case in ("one", mesh):
        devices = one_device() if case == "one" else make_mesh(MeshConfig(**sizes))
        backend, accumulation = "pmap" if case == "pmap" else "jit", 2 if case == "data" else 1
        trainer = Trainer(model, optimizer, devices, backend=backend, accumulation=accumulation, batch_loss=loss)
        steps[case] = [trainer.step(records(ROWS, first_sample=step * ROWS)) for step in range(2)]
    for actual, expected in zip(steps[mesh], steps["one"], strict=True):
        assert actual["batch_digest"] == expected["batch_digest"] and actual["accuracy"] == expected["accuracy"]
        # float32 sums in another order, compounded over two steps
        np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(actual["margin"], expected["margin"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(actual["grad_norm"], expected["grad_norm"], rtol=1e-4)


def test_another_reference_gives_another_digest():
    trainer = Trainer(MODEL, OptimizerConfig(), one_device(), batch_loss=choose_loss(ObjectiveConfig(name="dpo")))
    batch = records(ROWS)
    changed = dataclasses.replace(batch, reference=batch.reference * np.float32(1.0001))
    assert trainer.step(batch)["batch_digest"] != trainer.step(changed)["batch_digest"]


SOURCE = SourceConfig(path="a.jsonl", text_field="prompt", chosen_field="chosen", rejected_field="rejected")
REFUSED = {
    "dropout": (
        {"model": dataclasses.replace(MODEL, dropout=0.1)},
        r"model.dropout=0.1: objective.name='dpo' compares",
    ),
    "z loss": ({"train": TrainConfig(z_loss=1e-4)}, r"train.z_loss=0.0001: objective.name='dpo' has no term for it"),
    "packing": ({"data": DataConfig(sources={"main": SOURCE})}, r"data.packing='best_fit': .* one record in each row"),
    "no answers": (
        {"data": DataConfig(sources={"main": SourceConfig()}, packing="none")},
        r"objective.name='dpo': set data.sources.main.chosen_field",
    ),
    "a pair": (
        {"data": DataConfig(sources={"main": dataclasses.replace(SOURCE, pair_field="b")}, packing="none")},
        r"pair_field='b': objective.name='dpo' does not read",
    ),
    "a head": ({"model": dataclasses.replace(MODEL, num_outputs=1)}, r"model.num_outputs=1: a model with this head"),
    "another objective": ({"objective": ObjectiveConfig()}, r"chosen_field='chosen': objective.name='causal'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_something_else_is_refused(case):
    changes, message = REFUSED[case]
    fields = {
        "model": MODEL,
        "objective": ObjectiveConfig(name="dpo"),
        "data": DataConfig(sources={"main": SOURCE}, packing="none"),
    }
    with pytest.raises(UserError, match=message):
        RunConfig(**{**fields, **changes})


def test_a_bad_beta_is_refused():
    with pytest.raises(UserError, match=r"objective.beta=0.0: must be above 0"):
        ObjectiveConfig(name="dpo", beta=0.0)


SETTINGS = {
    **jobs.ONE_LAYER,
    "data.seq_len": 64,
    "model.num_kv_heads": 2,
    "model.mlp": 64,
    "model.dropout": 0,
    "train.steps": 30,
    "train.log_every": 1,
    "train.global_batch": 16,
    "checkpoint.every": 10,
    "optimizer.learning_rate": "0.01",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Prompts of one letter, of which the chosen answer repeats it."""
    path, rng = tmp_path_factory.mktemp("preferences") / "a.jsonl", np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(200):
            first, second = rng.choice(list("abcdefgh"), 2, replace=False)
            size = int(rng.integers(2, 8))
            record = {"prompt": first * 3, "chosen": str(first) * size, "rejected": str(second) * size}
            file.write(json.dumps(record) + "\n")
    return path


def arguments(corpus, workdir, size: str, **changes) -> list[str]:
    settings = {**SETTINGS, "data.sources.main.path": corpus, **changes}
    config = f"--config={jobs.ROOT / 'configs' / 'preferences.py'}:{size}"
    return [config, f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module", params=["dpo", "reward", "lora"])
def trained(request, corpus, tmp_path_factory):
    """(workdir, kind) of a run."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    changes = {"model.lora.rank": 4, "optimizer.learning_rate": "0.05"} if request.param == "lora" else {}
    size = "reward" if request.param == "reward" else "dpo"
    assert train_command(arguments(corpus, workdir, size, **changes)) == 0
    return workdir, request.param


def test_training_prefers_the_chosen_answers(trained):
    workdir, kind = trained
    lines = jobs.metrics(workdir)
    if kind != "reward":
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(lines[0]["margin"]) < 1e-5
        assert (workdir / "reference.npz").exists()
    assert lines[-1]["accuracy"] > 0.8 and lines[-1]["margin"] > 0
    scores = json.loads((workdir / "eval" / "30" / "validation.json").read_text())["total"]
    assert scores["accuracy"] > 0.8 and scores["chance_accuracy"] == 0.5 and scores["margin"] > 0
    assert scores["loss"] < math.log(2)
    assert eval_command([f"--workdir={workdir}", "--split=test"]) == 0
    test = json.loads((workdir / "eval" / "30" / "test.json").read_text())["total"]
    assert test["accuracy"] > 0.8


def test_rewards_of_chosen_answers_are_higher(trained, corpus):
    workdir, kind = trained
    if kind != "reward":
        return
    rewards = {}
    for field in ("chosen", "rejected"):
        output = workdir / f"{field}.jsonl"
        flags = [f"--workdir={workdir}", f"--input={corpus}", "--field=prompt", f"--pair_field={field}"]
        assert predict_command([*flags, f"--output={output}"]) == 0
        rewards[field] = np.array([json.loads(line)["reward"] for line in output.read_text().splitlines()])
    assert np.mean(rewards["chosen"] > rewards["rejected"]) > 0.8


def test_a_lost_reference_is_named(trained, corpus, tmp_path):
    workdir, kind = trained
    if kind != "dpo":
        return
    content = (workdir / "reference.npz").read_bytes()
    (workdir / "reference.npz").unlink()
    try:
        with pytest.raises(UserError, match=r"reference.npz: is missing or damaged, and the reference model of a run"):
            eval_command([f"--workdir={workdir}", "--split=test"])
    finally:
        (workdir / "reference.npz").write_bytes(content)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_and_resumed_run_equals_an_unbroken_one(corpus, tmp_path):
    changes = {
        "train.steps": 12,
        "checkpoint.every": 4,
        "model.lora.rank": 4,
        "train.compilation_cache": tmp_path / "compiled",
    }
    commands = [
        [str(jobs.LLMJAX), "train", *arguments(corpus, tmp_path / name, "dpo", **changes)]
        for name in ("whole", "killed")
    ]
    jobs.run(commands[0], LLMJAX_CPU_DEVICES="2")
    jobs.kill_after_checkpoint(commands[1], tmp_path / "killed" / "checkpoints" / "4", LLMJAX_CPU_DEVICES="2")
    printed = jobs.run(commands[1], LLMJAX_CPU_DEVICES="2")
    assert "resuming at step" in printed and "computing the log-likelihoods" not in printed
    assert jobs.trace(tmp_path / "killed") == jobs.trace(tmp_path / "whole")
