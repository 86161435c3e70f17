"""The teacher's config: what is refused, and what it adds to a state and to the FLOPs of a step."""

import dataclasses

import jax
import pytest

from llmjax.data.config import ObjectiveConfig
from llmjax.errors import UserError
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.nn.distillation import DistillConfig
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import config as run_config, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.teacher import (
    add_teacher,
    check_vocabulary,
    read_teacher_config,
    teacher_bytes,
    teacher_flops_per_token,
)

MODEL = DecoderConfig(vocab_size=64, num_layers=1, embed=32, num_heads=2, mlp=64)
LARGE = dataclasses.replace(MODEL, embed=64, remat="full")


@pytest.fixture
def config(tmp_path):
    """A run whose teacher has the model LARGE."""
    workdirs.write_json(tmp_path / "config.json", run_config.to_json(RunConfig(model=LARGE)))
    return RunConfig(model=MODEL, distill=DistillConfig(teacher=str(tmp_path)))


def test_a_teacher_adds_its_parameters_and_its_forward_pass(config):
    teacher = read_teacher_config(config)
    assert teacher is not None and teacher.model.embed == 64 and teacher.model.remat == "none"
    with axes.use_mesh(make_mesh(MeshConfig(fsdp=8, data=1))):
        spec = states.make_state_spec(MODEL, config.optimizer, horizon=10)
        full = add_teacher(spec, teacher)
    sizes = [leaf.size for leaf in jax.tree.leaves(full.shapes.teacher)]
    assert teacher_bytes(config) == 4 * sum(sizes) and full.shapes.opt_state is spec.shapes.opt_state
    assert any("fsdp" in str(sharding.spec) for sharding in jax.tree.leaves(full.shardings.teacher))
    expected = LARGE.flops_per_token(config.data.seq_len) / 3
    assert teacher_flops_per_token(config, teacher, config.data.seq_len) == pytest.approx(expected)
    alone = dataclasses.replace(config, distill=DistillConfig())
    assert read_teacher_config(alone) is None and teacher_bytes(alone) == 0
    assert teacher_flops_per_token(alone, None, 16) == 0


def test_another_task_or_vocabulary_is_refused(config):
    encoder = EncoderConfig(vocab_size=64, num_layers=1, embed=32, num_heads=2, mlp=64)
    masked = dataclasses.replace(config, model=encoder, objective=ObjectiveConfig(name="masked"))
    with pytest.raises(UserError, match=r"its run has objective.name 'causal', and this one 'masked'"):
        read_teacher_config(masked)
    other = run_config.with_fields(config, [("model.vocab_size", 65)])
    teacher = read_teacher_config(config)
    assert teacher is not None
    with pytest.raises(UserError, match=r"model.vocab_size=65: distill.teacher=.* has 64 logits; set it to 64"):
        check_vocabulary(other, teacher)
