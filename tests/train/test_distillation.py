"""Distillation: devices agree, the teacher stays as it is, and runs by commands are resumed with their own teacher."""

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest

from llmjax.checkpoint.manager import Checkpoints
from llmjax.cli.train import train as train_command
from llmjax.data.config import DataConfig, ObjectiveConfig, SourceConfig
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.distillation import DistillConfig, distillation_loss
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel import axes, backends, hosts
from llmjax.parallel.mesh import MeshConfig, ParallelConfig, make_mesh
from llmjax.run import state as states
from llmjax.run.config import RunConfig, TrainConfig
from llmjax.run.teacher import add_teacher
from llmjax.train.program import check_program, make_program
from tests import jobs
from tests.batches import packed, progressions
from tests.train.trainer import ROWS, one_device

SEQ, VOCAB = 16, 32
STUDENT = DecoderConfig(vocab_size=VOCAB, num_layers=1, embed=16, num_heads=2, mlp=32)
TEACHER = DecoderConfig(vocab_size=VOCAB, num_layers=2, embed=32, num_heads=4, mlp=64)
DISTILL = DistillConfig(teacher="runs/teacher", alpha=0.9)


class Student:
    """A compiled step on a mesh, and the state that it updates."""

    def __init__(self, mesh, *, model=STUDENT, distill=DISTILL, **fields):
        parallel = ParallelConfig(backend=fields.pop("backend", "jit"))
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant")
        train = TrainConfig(global_batch=ROWS, loss_chunk=8, **fields)
        config = RunConfig(model=model, distill=distill, optimizer=optimizer, train=train, parallel=parallel)
        self.mesh, self.model = mesh, model
        with axes.use_mesh(mesh):
            self.spec = spec = states.make_state_spec(model, optimizer, horizon=100)
            self.full = add_teacher(spec, dataclasses.replace(config, model=TEACHER)) if distill.teacher else spec
            self.compiled = make_program(config, self.full, hosts.local_rows(backends.batch_sharding(), ROWS), ROWS)

    def start(self, teacher_params=None):
        """Start from step 0."""
        with axes.use_mesh(self.mesh):
            state = states.init_state(self.spec, self.model, seed=0)
            if self.full.teacher is not None:
                params = registry.init(TEACHER, jax.random.key(7)) if teacher_params is None else teacher_params
                state = dataclasses.replace(state, teacher=jax.device_put(params, self.full.shardings.teacher))
            self.state = self.compiled.shard_state(state)
        return self

    def step(self, batch):
        with axes.use_mesh(self.mesh):
            self.state, metrics = self.compiled.step(self.state, self.compiled.shard_batch(batch))
        return jax.device_get(metrics)

    def global_state(self):
        return self.compiled.unshard_state(self.state)


MESHES = {
    "fsdp": (MeshConfig(data=2, fsdp=4), {}),
    "tensor": (MeshConfig(data=2, fsdp=2, tensor=2), {"accumulation": 2}),
    "pmap": (MeshConfig(data=8), {"backend": "pmap"}),
}


@pytest.fixture(scope="module")
def on_one_device():
    return Student(one_device())


@pytest.fixture(scope="module")
def expected(on_one_device):
    """Metrics of two steps on one device."""
    student = on_one_device.start()
    return [student.step(packed(ROWS, SEQ, VOCAB, first_sample=step * ROWS)) for step in range(2)]


@pytest.mark.parametrize("case", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tensor", "pmap"))])
def test_eight_devices_agree_with_one_and_leave_the_teacher_as_it_is(expected, case):
    mesh, fields = MESHES[case]
    student = Student(make_mesh(mesh), **fields).start()
    before = jax.device_get(student.global_state().teacher)
    for number, metrics in enumerate(expected):
        actual = student.step(packed(ROWS, SEQ, VOCAB, first_sample=number * ROWS))
        assert actual["batch_digest"] == metrics["batch_digest"]
        for name in ("loss", "teacher_kl", "grad_norm"):  # float32 sums in another order, compounded over two steps
            np.testing.assert_allclose(actual[name], metrics[name], rtol=2e-4)
    state = student.global_state()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.teacher), before)
    assert "teacher" not in states.to_checkpoint(state)


def test_a_student_learns_the_teacher_better_than_from_the_targets_alone(on_one_device):
    """The same tokens, half of which are noise: probabilities of the teacher say more about each than one draw."""
    rng = np.random.default_rng(0)

    def batch(step: int):
        rows = progressions(step, ROWS, SEQ, VOCAB)
        targets = np.where(rng.random(rows.targets.shape) < 0.5, rows.targets, rng.integers(0, VOCAB, (ROWS, SEQ)))
        return dataclasses.replace(rows, targets=targets.astype(np.int32))

    teacher = Student(one_device(), model=TEACHER, distill=DistillConfig()).start()
    for step in range(120):
        teacher.step(batch(step))
    params = jax.device_get(teacher.global_state().params)
    held_out, divergence = progressions(1000, ROWS, SEQ, VOCAB), {}

    @jax.jit
    def mean_divergence(student_params):
        own, large = (
            nnx.merge(registry.abstract(STUDENT)[0], student_params),
            nnx.merge(registry.abstract(TEACHER)[0], params),
        )
        student, teacher = own(held_out).hidden, large(held_out).hidden
        settings: dict = dict(chunk=0, z_loss=0.0, alpha=1.0, temperature=1.0)
        sums = distillation_loss(student, own.unembed, teacher, large.unembed, held_out, **settings)
        assert sums.kl is not None
        return sums.kl / sums.weight

    alone = Student(one_device(), distill=DistillConfig())
    for name, student in (("targets", alone.start()), ("teacher", on_one_device.start(params))):
        for step in range(60):
            student.step(batch(500 + step))
        divergence[name] = float(mean_divergence(jax.device_get(student.global_state().params)))
    assert divergence["teacher"] < 0.8 * divergence["targets"]


SOURCE = {"main": SourceConfig(label_field="label")}
REFUSED = {
    "regress": (
        {"objective": ObjectiveConfig(name="regress"), "data": DataConfig(sources=SOURCE)},
        r"distill.teacher=runs/teacher: objective.name='regress' predicts no tokens or classes",
    ),
    "several labels": (
        {
            "objective": ObjectiveConfig(name="classify"),
            "data": DataConfig(sources=SOURCE, classes=("a", "b"), multi_label=True),
        },
        r"distill.teacher=runs/teacher: data.multi_label=True decides each class by itself",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_objectives_without_a_softmax_are_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        RunConfig(model=STUDENT, distill=DISTILL, **changes)


def test_a_fixed_tree_is_refused():
    config = RunConfig(
        model=STUDENT,
        distill=DISTILL,
        parallel=ParallelConfig(reduction="fixed_tree", virtual_shards=8),
        train=TrainConfig(global_batch=8),
    )
    with axes.use_mesh(one_device()), pytest.raises(UserError, match=r"distill.teacher=runs/teacher: .*'fixed_tree'"):
        check_program(config)


SETTINGS = {
    **jobs.ONE_LAYER,
    "data.seq_len": 32,
    "model.num_kv_heads": 2,
    "model.mlp": 32,
    "model.dropout": 0.1,
    "mesh.fsdp": 8,
    "mesh.data": 1,
    "train.steps": 6,
    "train.log_every": 1,
    "train.global_batch": 8,
    "train.loss_chunk": 16,
    "checkpoint.every": 3,
    "checkpoint.keep": 5,
    "sample.prompts": "()",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return jobs.write_corpus(tmp_path_factory.mktemp("corpus"), 12)


def arguments(corpus, workdir, **changes) -> list[str]:
    settings = {**SETTINGS, "data.sources.main.path": f"{corpus}/*.txt"}
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    config = f"--config={jobs.ROOT / 'configs' / 'quickstart.py'}"
    return [config, f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    assert train_command(arguments(corpus, workdir, model__embed=64)) == 0
    return workdir


@pytest.fixture(scope="module")
def student(corpus, teacher, tmp_path_factory):
    """A run of six steps that was not interrupted."""
    workdir = tmp_path_factory.mktemp("student") / "run"
    assert train_command(arguments(corpus, workdir, distill__teacher=teacher)) == 0
    return workdir


def test_a_run_records_its_teacher_and_does_not_save_it(student, teacher):
    record = json.loads((student / "run.json").read_text())["teacher"]
    meta = Checkpoints(teacher / "checkpoints").read_meta(6)
    assert (record["workdir"], record["step"]) == (str(teacher), 6) and record["fingerprint"] == meta["fingerprint"]
    assert record["forward_flops_per_token"] > 0
    line = jobs.metrics(student)[-1]
    assert line["teacher_kl"] > 0 and np.isfinite(line["loss"])
    saved = {path.name for path in (student / "checkpoints" / "6").iterdir()}
    assert {"params", "opt_state"} <= saved and not any("teacher" in name for name in saved)
    assert json.loads((student / "eval" / "6" / "validation.json").read_text())["total"]["loss"] > 0


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(corpus, student, teacher, tmp_path):
    workdir = tmp_path / "run"
    cache = student / "compilation_cache"
    for stop in (3, 0):
        changes = {"distill__teacher": teacher, "train__stop_at": stop, "train__compilation_cache": cache}
        assert train_command(arguments(corpus, workdir, **changes)) == 0
    fingerprints = [Checkpoints(each / "checkpoints").read_meta(6)["fingerprint"] for each in (workdir, student)]
    assert fingerprints[0] == fingerprints[1]
    assert [line["loss"] for line in jobs.metrics(workdir)] == [line["loss"] for line in jobs.metrics(student)]


def test_another_teacher_is_refused_when_a_run_is_resumed(corpus, student, teacher):
    for changes in ({"distill__teacher": teacher, "distill__step": 3}, {}):
        with pytest.raises(UserError, match=r"the teacher changed since the start of this run \(.*step 6.* -> "):
            train_command(arguments(corpus, student, train__steps=7, **changes))


@pytest.mark.slow
def test_a_resumed_run_keeps_the_step_of_its_teacher_and_can_accept_another(corpus, teacher, tmp_path):
    recorded = lambda: json.loads((tmp_path / "run.json").read_text())["teacher"]
    steps = {"distill__teacher": teacher, "checkpoint__every": 1}
    assert train_command(arguments(corpus, tmp_path, **steps, distill__step=3, train__stop_at=1)) == 0
    assert train_command(arguments(corpus, tmp_path, **steps, train__stop_at=2)) == 0
    assert recorded()["step"] == 3  # and not the newest, 6
    accepted = {"train__stop_at": 3, "checkpoint__accept_changes": True}
    assert train_command(arguments(corpus, tmp_path, **steps, distill__step=6, **accepted)) == 0
    assert recorded()["step"] == 6
    assert train_command(arguments(corpus, tmp_path, **{**accepted, "train__stop_at": 4})) == 0
    assert recorded() is None and "teacher_kl" not in jobs.metrics(tmp_path)[-1]


def test_a_teacher_that_does_not_fit_is_refused(corpus, teacher, tmp_path):
    cases = {
        "no config.json there": {"distill__teacher": tmp_path},
        "no checkpoint of step 5 there; the steps there are": {"distill__teacher": teacher, "distill__step": 5},
        "set it to 259": {"distill__teacher": teacher, "model__vocab_size": 300},
        "its run has objective.name 'causal', and this one 'fim'": {
            "distill__teacher": teacher,
            "objective__name": "fim",
        },
        "its tokenizer .* is not this run's": {
            "distill__teacher": teacher,
            "data__tokenizer__kind": "sentencepiece",
            "data__tokenizer__vocab_size": 400,
        },
    }
    for number, (message, changes) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            train_command(arguments(corpus, tmp_path / str(number), **changes))


@pytest.mark.slow
def test_a_classifier_learns_from_one_of_another_family(tmp_path):
    """The teacher's head gives logits of classes; an RNN learns from a decoder, both at a document's last token."""
    with open(tmp_path / "a.jsonl", "w") as file:
        for number in range(60):
            record = {"text": ("good " if number % 2 else "bad ") * (1 + number % 5), "label": number % 2}
            file.write(json.dumps(record) + "\n")
    fields = {
        "data__sources__main__path": tmp_path / "a.jsonl",
        "data__sources__main__label_field": "label",
        "data__classes": "('0','1')",
        "objective__name": "classify",
    }
    assert train_command(arguments(tmp_path, tmp_path / "large", **fields)) == 0
    student = tmp_path / "student.py"
    student.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(model=dict(family='recurrent', cell='gru', num_layers=1, embed=16)))\n"
    )
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("model.")}
    settings |= {name.replace("__", "."): value for name, value in fields.items()}
    flags = [f"--config={student}", f"--workdir={tmp_path / 'small'}", f"--config.distill.teacher={tmp_path / 'large'}"]
    assert train_command([*flags, *(f"--config.{name}={value}" for name, value in settings.items())]) == 0
    line = jobs.metrics(tmp_path / "small")[-1]
    assert line["teacher_kl"] > 0 and 0 <= line["accuracy"] <= 1
