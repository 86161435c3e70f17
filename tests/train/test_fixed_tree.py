"""parallel.reduction="fixed_tree": the same bits of a step on any number of devices and processes."""

import re
import sys

import jax
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import state as states
from llmjax.train.program import check_program, make_program
from tests import jobs
from tests.train.fixed_tree_worker import SHARDS, run, tiny


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_one_two_and_eight_devices_give_the_same_bits():
    expected = run(tiny(), 1, 1)
    for layout in ((1, 2), (2, 4)):
        assert_equal(run(tiny(), *layout), expected)


# Layouts: V = 8 D; V = D along one axis or both. The decoder with AdamW is in the other tests. Lion, SGD and
# schedule-free AdamW update blocks, the others whole layers; factored moments need dimensions of 128 or more.
SMALL = ("llama:tiny", "model.num_layers=1")
VARIANTS = {
    "moe": (
        "mixtral:tiny",
        "model.remat=attention",
        "model.scan=True",
        "model.attention=blockwise",
        "optimizer.moment_dtype=bfloat16",
        "1x1 4x2",
    ),
    "encoder": ("bert:tiny", "model.num_layers=1", "optimizer.moment_dtype=int8", "1x1 1x8"),
    "encdec": (
        "t5:tiny",
        "model.embed=128",
        "model.mlp=256",
        "model.head_dim=8",
        "optimizer.name=adafactor",
        "1x1 4x2",
    ),
    "lstm": ("recurrent:lstm", "optimizer.name=lion", "1x1 1x8"),
    "rglru": ("recurrent:rglru", "model.gate_blocks=2", "model.hidden=32", "optimizer.name=adafactor", "1x1 1x8"),
    "remat": (
        "llama:tiny",
        "model.remat=full",
        "model.scan=True",
        "optimizer.name=sgd",
        "optimizer.ema_decay=0.9",
        "1x1 1x8",
    ),
    "muon": ("llama:tiny", "optimizer.name=muon", "1x1 1x2"),
    "schedule_free": (*SMALL, "optimizer.name=schedule_free_adamw", "model.dtype=bfloat16", "1x1 1x8"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("users_compiler")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("moe", "muon") else pytest.mark.exhaustive) for name in VARIANTS],
)
def test_layouts_give_the_same_bits(name):
    """Packed rows with dropout and clipping. In a process of its own, with the compiler as users have it."""
    *settings, layouts = VARIANTS[name]
    command = [sys.executable, "-m", "tests.train.fixed_tree_worker", *settings, *layouts.split()]
    printed = jobs.run(command, timeout=900, PYTHONPATH=str(jobs.ROOT))
    hashes = [line.split() for line in printed.splitlines() if re.match(r"\dx\d [0-9a-f]{64}$", line)]
    assert len(hashes) >= 2 and len({digest for _, digest in hashes}) == 1, printed


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer__name": "adafactor", "model__embed": 128, "model__mlp": 128}],
    ids=["adamw", "adafactor"],
)
def test_it_agrees_with_the_compilers_own_sums(changes):
    """Another order of float32 sums: 1e-5 of a loss of 5.5, and of a gradient norm, is some tens of roundings."""
    fixed, _, scores = run(tiny(**changes), 2, 2)
    xla, _, xla_scores = run(tiny(**changes, parallel__virtual_shards=0, parallel__reduction="xla"), 2, 2)
    for ours, theirs in zip(fixed, xla, strict=True):
        for name in ("loss", "grad_norm", "z_loss", "num_targets"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)
        np.testing.assert_array_equal(ours["batch_digest"], theirs["batch_digest"])
    (sums, counts), (xla_sums, xla_counts) = scores, xla_scores
    np.testing.assert_allclose(sums.nats, xla_sums.nats, rtol=1e-5)
    np.testing.assert_array_equal(counts["target_counts"], xla_counts["target_counts"])


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"parallel__virtual_shards": 0}, (1, 1), "parallel.virtual_shards=0: set it to a power of two"),
        ({"parallel__reduction": "xla"}, (1, 1), "parallel.virtual_shards=8: .* to 0 for 'xla'"),
        ({"parallel__virtual_shards": 4}, (1, 8), "data x mesh.fsdp=8: .* use 4 devices"),
        ({"train__global_batch": 24}, (3, 1), "data x mesh.fsdp=3: .* use 2 devices"),
        ({"train__global_batch": 12}, (1, 1), "train.global_batch=12: .* set it to a multiple"),
        (
            {"train__batch_schedule": ((64, 20),)},
            (1, 1),
            "train.batch_schedule global_batch=20: .* set it to a multiple",
        ),
        ({"eval__batch": 12}, (1, 1), "eval.batch=12: .* set it to a multiple"),
        ({"train__global_batch": 24, "train__accumulation": 3}, (1, 1), "train.accumulation=3: .* 8 micro-steps"),
        ({"model__param_dtype": "bfloat16"}, (1, 1), "model.param_dtype='bfloat16'"),
        ({"model__quantization": "int8"}, (1, 1), "model.quantization='int8'"),
        ({"parallel__backend": "pmap"}, (2, 1), "parallel.backend='pmap'"),
        ({"parallel__gradient_dtype": "bfloat16"}, (2, 1), "parallel.gradient_dtype='bfloat16'"),
        ({"model__embed": 40}, (1, 1), "cuts parameters into 16 blocks along embed, which has 40; set it to 4 or less"),
    ],
)
def test_what_cannot_be_made_equal_is_refused(changes, layout, message):
    config = tiny(**changes)
    mesh = make_mesh(MeshConfig(data=layout[0], fsdp=layout[1]), jax.devices()[: layout[0] * layout[1]])
    with axes.use_mesh(mesh), pytest.raises(UserError, match=message):
        check_program(config)
        spec = states.make_state_spec(config.model, config.optimizer, horizon=100)
        make_program(config, spec, np.arange(config.train.global_batch), config.train.global_batch)


def test_tensor_parallelism_is_refused():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with axes.use_mesh(mesh), pytest.raises(UserError, match=r"mesh\.tensor=2: .* set it to 1"):
        check_program(tiny())


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train the tiny model of `jobs` on some layouts, one after another in one workdir; returns the workdir."""
    corpus = jobs.write_corpus(tmp_path_factory.mktemp("corpus"))
    store = tmp_path_factory.mktemp("shared") / "store"
    fields = {"parallel__reduction": "fixed_tree", "parallel__virtual_shards": SHARDS, "data__store": store}
    fields |= {
        "model__num_layers": 1,
        "eval__every": 4,
        "checkpoint__every": 2,
        "train__batch_schedule": "((96,32),)",
    }  # steps 7 to 12 have 32 rows

    def run(*layouts):
        workdir = tmp_path_factory.mktemp("run")
        for processes, devices, fsdp, stop_at in layouts:
            changes = {**fields, "mesh__fsdp": fsdp, "train__stop_at": stop_at}
            jobs.run(jobs.launch(jobs.command("train", workdir, corpus, **changes), processes, devices), timeout=600)
        return workdir

    return run


def result(workdir):
    """Losses, fingerprints of checkpoints, and scores of the validation split."""
    fingerprints = {step: entry["fingerprint"] for step, entry in jobs.checkpoints(workdir).items()}
    scores = {path.parent.name: path.read_text() for path in workdir.glob("eval/*/validation.json")}
    return jobs.trace(workdir), fingerprints, scores


@pytest.mark.slow
@pytest.mark.timeout(900)  # six jobs
def test_a_run_that_moves_between_processes_and_devices_equals_an_unbroken_one(train):
    """(processes, devices of each, fsdp, last step): 8, 4, 2, 8 and 8 devices, in 1, 2 and 4 processes."""
    unbroken = result(train((1, 1, 1, 12)))
    assert [step for step, *_ in unbroken[0]] == list(range(1, 13)) and set(unbroken[2]) >= {"4", "8", "12"}
    losses, fingerprints, scores = result(train((1, 8, 4, 2), (2, 2, 2, 4), (2, 1, 1, 6), (4, 2, 1, 8), (2, 4, 8, 12)))
    assert losses == unbroken[0]
    for moved, expected in ((fingerprints, unbroken[1]), (scores, unbroken[2])):
        assert {step: moved[step] for step in expected} == expected
