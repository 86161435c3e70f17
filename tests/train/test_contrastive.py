"""Contrastive training: one device and eight agree on the global loss, padding is free, and a killed run resumes."""

import dataclasses
import functools
import json

from flax import nnx
import jax
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.cli.embed import embed as embed_command
from llmjax.cli.train import train as train_command
from llmjax.data.batches.packing import Rows
from llmjax.data.config import DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.objectives.record_batch import TextsTask, build_texts_batch
from llmjax.errors import UserError
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.recurrent import RecurrentConfig
from llmjax.nn.pair_losses import choose_loss, embed_texts
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, ParallelConfig, make_mesh
from llmjax.run.config import RunConfig, TrainConfig
from llmjax.train.program import check_program
from tests import jobs
from tests.models.programs import init_model
from tests.train.trainer import ROWS, Trainer, one_device

SEQ, VOCAB = 32, 100
SMALL = dict(vocab_size=VOCAB, num_layers=2, embed=32)
MODELS = {
    "encoder": EncoderConfig(**SMALL, num_heads=4, mlp=64, max_positions=48, token_types=2),
    "decoder": DecoderConfig(**SMALL, num_heads=4, mlp=64),
    "recurrent": RecurrentConfig(**SMALL, cell="gru"),
}


def records(rows: int, texts: int, seq_len: int = SEQ, first_sample: int = 0) -> Batch:
    """Random records, whose texts have 1 to 8 tokens."""
    rng = np.random.default_rng(first_sample)
    counts = rng.integers(1, 9, (rows, texts))
    targets, labels = np.zeros((rows, SEQ), np.int32), np.zeros((rows, SEQ, texts), np.float32)
    segments = (np.arange(SEQ) <= counts.sum(axis=1)[:, None]).astype(np.int32)
    targets[:] = rng.integers(3, VOCAB, targets.shape) * segments
    labels[:, 0] = counts
    positions = np.arange(SEQ, dtype=np.int32) * segments
    scored = segments > 0
    packed = Rows(targets=targets, inputs=targets, segments=segments, positions=positions, scored=scored, labels=labels)
    task = TextsTask(num_texts=texts, before=(1,), after=(2,))
    return build_texts_batch(packed, first_sample + np.arange(rows), task, seq_len)


def contrastive(**fields):
    return choose_loss(ObjectiveConfig(name="contrastive", **fields))


@functools.partial(jax.jit, static_argnums=(0, 3))
def vectors(graph, params, batch, pooling):
    return embed_texts(nnx.merge(graph, params)(batch).hidden, batch, pooling)


@pytest.mark.parametrize(("name", "pooling"), [("encoder", "mean"), ("decoder", "last"), ("recurrent", "mean")])
def test_texts_of_a_row_do_not_see_each_other_nor_padding(name, pooling):
    graph, params = init_model(MODELS[name])
    batch = records(3, 3)
    together = vectors(graph, params, batch, pooling)
    longer = vectors(graph, params, records(3, 3, seq_len=48), pooling)
    np.testing.assert_allclose(longer, together, atol=2e-5)
    for number in range(3):
        alone = {name: np.zeros_like(batch.inputs) for name in ("inputs", "segments", "positions")}
        for row in range(3):
            inside = np.flatnonzero(batch.segments[row] == number + 1)
            alone["inputs"][row, : len(inside)] = batch.inputs[row, inside]
            alone["segments"][row, : len(inside)] = 1
            alone["positions"][row, : len(inside)] = np.arange(len(inside))
        single = vectors(graph, params, dataclasses.replace(batch, **alone, num_texts=1), pooling)
        np.testing.assert_allclose(single[:, 0], together[:, number], atol=2e-5)


@pytest.mark.parametrize("mesh", ["data", pytest.param("fsdp", marks=pytest.mark.exhaustive), "tensor"])
def test_eight_devices_agree_with_one(mesh):
    """In-batch negatives come from all devices: the loss of a device's own rows alone is another one."""
    sizes = {"data": dict(data=8), "fsdp": dict(data=2, fsdp=4), "tensor": dict(data=2, fsdp=2, tensor=2)}[mesh]
    model = dataclasses.replace(MODELS["encoder"], dropout=0.1)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    steps = {}
    for name, devices in (("one", one_device()), (mesh, make_mesh(MeshConfig(**sizes)))):
        trainer = Trainer(model, optimizer, devices, batch_loss=contrastive())
        steps[name] = [trainer.step(records(ROWS, 3, first_sample=step * ROWS)) for step in range(2)]
    for actual, expected in zip(steps[mesh], steps["one"], strict=True):
        assert actual["batch_digest"] == expected["batch_digest"] and actual["num_targets"] == ROWS
        assert actual["accuracy"] == expected["accuracy"]
        # float32 sums in another order, compounded over two steps
        np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(actual["grad_norm"], expected["grad_norm"], rtol=1e-4)


SOURCE = SourceConfig(path="a.jsonl", pair_field="pair")
REFUSED = {
    "accumulation": (
        {"train": TrainConfig(accumulation=2)},
        r"train.accumulation=2: .* all others of the global batch",
    ),
    "one record": ({"train": TrainConfig(global_batch=1)}, r"train.global_batch=1: .* set it to 2 or more"),
    "z loss": ({"train": TrainConfig(z_loss=1e-4)}, r"train.z_loss=0.0001: .* has no term for it"),
    "pmap": ({"parallel": ParallelConfig(backend="pmap")}, r"backend='pmap': .* those of all devices; use 'jit'"),
    "packing": ({"data": DataConfig(sources={"main": SOURCE})}, r"data.packing='best_fit': .* one record in each row"),
    "no pair": (
        {"data": DataConfig(sources={"main": SourceConfig()}, packing="none")},
        r"'contrastive': set data.sources.main.pair_field",
    ),
    "labels": (
        {"data": DataConfig(sources={"main": dataclasses.replace(SOURCE, label_field="score")}, packing="none")},
        r"label_field='score': objective.name='contrastive' has no use for labels",
    ),
    "a score": (
        {"data": DataConfig(sources={"main": dataclasses.replace(SOURCE, score_field="score")}, packing="none")},
        r"score_field='score': objective.name='contrastive' does not read this field .* similarity",
    ),
    "another objective": (
        {"objective": ObjectiveConfig()},
        r"pair_field='pair': objective.name='causal' does not read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_something_else_is_refused(case):
    changes, message = REFUSED[case]
    fields = {
        "objective": ObjectiveConfig(name="contrastive"),
        "data": DataConfig(sources={"main": SOURCE}, packing="none"),
    }
    with pytest.raises(UserError, match=message):
        RunConfig(**{**fields, **changes})


def test_rows_that_are_cut_over_devices_are_refused():
    data = DataConfig(sources={"main": SOURCE}, packing="none")
    config = RunConfig(model=MODELS["decoder"], objective=ObjectiveConfig(name="contrastive"), data=data)
    refused = pytest.raises(UserError, match=r"mesh.sequence=2: objective.name='contrastive' was not tried")
    with axes.use_mesh(make_mesh(MeshConfig(data=4, sequence=2))), refused:
        check_program(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "meen"}, r"objective.pooling='meen' \(did you mean 'mean'\?\)"),
        ({"temperature": 0.0}, r"objective.temperature=0.0: must be above 0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(name="contrastive", **fields)


SETTINGS = {
    **jobs.ONE_LAYER,
    "data.seq_len": 48,
    "model.max_positions": 48,
    "objective.pooling": "max",
    "train.steps": 40,
    "train.log_every": 1,
    "train.global_batch": 16,
    "checkpoint.every": 10,
    "optimizer.learning_rate": "0.003",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Pairs of texts of the same two letters."""
    path, rng = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(300):
            letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 2, replace=False)
            text, pair = ("".join(rng.choice(letters, rng.integers(4, 12))) for _ in range(2))
            file.write(json.dumps({"text": text, "pair": pair}) + "\n")
    return path


def arguments(corpus, workdir, **changes) -> list[str]:
    settings = {**SETTINGS, "data.sources.main.path": corpus, **changes}
    config = f"--config={jobs.ROOT / 'configs' / 'embed.py'}"
    return [config, f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("contrastive") / "run"
    assert train_command(arguments(corpus, workdir)) == 0
    return workdir


def test_training_finds_the_pairs_and_embed_pools_as_training_did(trained, corpus):
    scores = json.loads((trained / "eval" / "40" / "validation.json").read_text())["total"]
    assert scores["accuracy"] > 3 * scores["chance_accuracy"] and scores["baseline_accuracy"] is None
    assert scores["bits_per_byte"] is None and scores["perplexity"] is None
    output = trained / "vectors.npy"
    assert embed_command([f"--workdir={trained}", f"--input={corpus}", f"--output={output}"]) == 0
    first = np.load(output)
    assert embed_command([f"--workdir={trained}", f"--input={corpus}", f"--output={output}2.npy", "--field=pair"]) == 0
    second = np.load(f"{output}2.npy")
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    similar = first @ second.T
    assert np.mean(np.diag(similar)) > np.mean(similar) + 0.3
    explicit = [f"--workdir={trained}", f"--input={corpus}", f"--output={output}3.npy", "--pooling=max"]
    assert embed_command(explicit) == 0
    np.testing.assert_array_equal(np.load(f"{output}3.npy"), first)


def test_similarity_learns_scores(tmp_path):
    """The score of two texts is 1 if they have the same letter, else 0."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.jsonl", "w") as file:
        for number in range(300):
            first, second = map(str, rng.choice(list("abcdefghij"), 2, replace=False))
            sizes = rng.integers(1, 15, 2).tolist()
            pair = (first if number % 2 else second) * sizes[1]
            record = {"text": first * sizes[0], "pair": pair, "score": number % 2}
            file.write(json.dumps(record) + "\n")
    changes = {"train.steps": 60, "data.sources.main.score_field": "score", "objective.pooling": ""}
    flags = arguments(tmp_path / "a.jsonl", tmp_path / "run", **changes)
    assert train_command([f"{flags[0]}:similarity", *flags[1:]]) == 0
    scores = json.loads((tmp_path / "run" / "eval" / "60" / "validation.json").read_text())["total"]
    assert scores["spearman"] > 0.6 and scores["accuracy"] is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"]["pooling"] == "mean"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_and_resumed_run_equals_an_unbroken_one(corpus, tmp_path):
    changes = {"train.steps": 12, "checkpoint.every": 4, "train.compilation_cache": tmp_path / "compiled"}
    commands = [
        [str(jobs.LLMJAX), "train", *arguments(corpus, tmp_path / name, **changes)] for name in ("whole", "killed")
    ]
    jobs.run(commands[0], LLMJAX_CPU_DEVICES="2")
    jobs.kill_after_checkpoint(commands[1], tmp_path / "killed" / "checkpoints" / "4", LLMJAX_CPU_DEVICES="2")
    assert "resuming at step" in jobs.run(commands[1], LLMJAX_CPU_DEVICES="2")
    assert jobs.trace(tmp_path / "killed") == jobs.trace(tmp_path / "whole")
