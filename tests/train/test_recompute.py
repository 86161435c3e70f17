"""A step that is computed twice: training keeps its bits, and one wrong bit in either result names the device."""

import dataclasses

import jax
import pytest

from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.errors import HardwareError, UserError
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run.config import RunConfig, TrainConfig
from llmjax.train import recompute
from tests.faults import flip_a_bit
from tests.train.test_step import batch, make_trainer

LAYOUTS = {"fsdp": (MeshConfig(data=2, fsdp=4), "jit"), "pmap": (MeshConfig(data=8), "pmap")}


@pytest.fixture(scope="module", params=LAYOUTS)
def trainer(request):
    mesh, backend = LAYOUTS[request.param]
    return make_trainer(make_mesh(mesh), backend=backend)


def test_training_keeps_its_bits(trainer):
    start = recompute._copy(trainer.state)
    unshard, shard_batch = trainer.compiled.unshard_state, trainer.compiled.shard_batch
    losses = [trainer.step(batch(step))["loss"] for step in range(2)]
    expected = fingerprint(trainer.global_state().params, trainer.global_state().opt_state)
    with axes.use_mesh(trainer.mesh):
        state, again = start, []
        for step in range(2):
            state, metrics = recompute.step_twice(trainer.compiled, state, shard_batch(batch(step)), step)
            again.append(jax.device_get(metrics)["loss"])
        assert fingerprint(unshard(state).params, unshard(state).opt_state) == expected
    assert again == losses
    trainer.state = state


@pytest.mark.parametrize("faulty_call", [1, 2])
def test_one_wrong_bit_in_either_result_names_the_device(trainer, faulty_call):
    """The bit is in the optimizer's state, which has no copy on `fsdp`."""
    compiled, calls = trainer.compiled, []

    def faulty_step(state, rows):
        state, metrics = compiled.step(state, rows)
        calls.append(None)
        if len(calls) == faulty_call:
            leaves, structure = jax.tree.flatten(state.opt_state)
            largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
            leaves[largest] = flip_a_bit(leaves[largest], device=5)
            state = dataclasses.replace(state, opt_state=structure.unflatten(leaves))
        return state, metrics

    with axes.use_mesh(trainer.mesh):
        state, rows = recompute._copy(trainer.state), compiled.shard_batch(batch(7))
        with pytest.raises(HardwareError, match=r"step 7 was computed twice, .*: device 5 of process 0; nothing is"):
            recompute.step_twice(dataclasses.replace(compiled, step=faulty_step), state, rows, 7)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(UserError, match=r"train\.recompute_every=-1: must not be negative"):
        RunConfig(train=TrainConfig(recompute_every=-1))
