"""Compile a small step ahead of time with the real TPU compiler and with XLA:CPU."""

import importlib.util

import pytest

from llmjax.models import registry
from llmjax.plan import compile_ahead, count, plan as plans, topology as topologies
from llmjax.run import config as run_config, workdir as workdirs

SMALL = (
    ("model.vocab_size", "512"),
    ("model.vocab_multiple", "1"),
    ("model.num_layers", "2"),
    ("model.scan", "True"),
    ("data.seq_len", "256"),
    ("train.loss_chunk", "256"),
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def make_plan(topology, *overrides, spec="llama:tiny", quick=True):
    config = run_config.resolve(spec, (*SMALL, *overrides))
    return plans.make_plan(config, topologies.parse(topology), quick=quick)


@needs_libtpu
def test_a_tpu_step_executes_the_flops_of_the_formula():
    """Without remat: the model's FLOPs, the half of the scores that the causal mask hides, and the matrices that rotate
    queries and keys on TPU, which add 1% here. Norms are no matmuls."""
    sharded = (("mesh.data", "1"), ("mesh.fsdp", "-1"))
    plan = make_plan("v5e:2x2", ("model.dtype", "bfloat16"), ("model.attention", "dot"), *sharded)
    model, seq = plan.config.model, plan.config.data.seq_len
    rows = plan.config.train.global_batch // plan.devices
    hidden = 3 * 2 * model.num_layers * model.num_heads * model.head_size * seq * seq * rows
    assert plan.costs.matmul_flops == pytest.approx(plan.model_flops + hidden, rel=0.015)
    state = 3 * 4 * plan.program.parameters / plan.devices
    assert plan.program.parameter_bytes + plan.program.optimizer_bytes == pytest.approx(state, rel=0.01)
    assert 0 < plan.program.memory.arguments < plan.program.memory.total < plan.topology.chip.hbm
    assert plan.fits and plan.costs.ici_bytes > 0 and plan.costs.dcn_bytes == 0
    assert plan.time is not None and plan.mfu is not None and 0 < plan.mfu < 1


@needs_libtpu
@pytest.mark.slow
def test_a_teacher_adds_its_parameters_and_the_flops_of_its_forward_pass(tmp_path):
    fields = (("model.dtype", "bfloat16"), ("model.attention", "dot"), ("mesh.data", "1"), ("mesh.fsdp", "-1"))
    alone = make_plan("v5e:2x2", *fields)
    teacher = run_config.with_fields(alone.config, [("model.mlp", 1024)])
    workdirs.write_json(tmp_path / workdirs.CONFIG, run_config.to_json(teacher))
    plan = make_plan("v5e:2x2", *fields, ("distill.teacher", str(tmp_path)))
    bytes_of_teacher = 4 * registry.count_parameters(teacher.model) / plan.devices
    assert plan.program.teacher_bytes == pytest.approx(bytes_of_teacher, rel=0.01) and not alone.program.teacher_bytes
    # Small arrays are padded to the tiles of the TPU's memory.
    assert 1 <= (plan.program.memory.arguments - alone.program.memory.arguments) / bytes_of_teacher < 1.3
    executed = plan.costs.matmul_flops - alone.costs.matmul_flops
    # The formula leaves out the scores that the causal mask hides, and the matrices that rotate queries and keys.
    assert executed == pytest.approx(plan.model_flops - alone.model_flops, rel=0.1)


@needs_libtpu
@pytest.mark.slow
def test_the_full_depth_reads_cycles_and_agrees_with_the_quick_one():
    """The program is the same. Small matmuls are far from the usual share of the peak, so the time is only near."""
    quick = make_plan("v5e:2x2", ("model.dtype", "bfloat16"))
    full = make_plan("v5e:2x2", ("model.dtype", "bfloat16"), quick=False)
    assert full.program.scheduled
    assert full.costs.matmul_flops == quick.costs.matmul_flops
    assert full.program.memory.total == pytest.approx(quick.program.memory.total, rel=0.05)
    assert full.time is not None and quick.time is not None
    assert full.time.matmul > 0.5 * quick.time.matmul and full.time.exposed > 0


@pytest.mark.parametrize(
    ("spec", "field", "sizes"),
    [("t5:tiny", "source", (4, 256)), ("llama:tiny", "prefix", None), ("bert:tiny", "weights", (4, 256))],
)
def test_the_batch_has_the_fields_of_the_objective(spec, field, sizes):
    config = run_config.resolve(spec, (("model.vocab_size", "512"), ("data.seq_len", "256")))
    leaf = getattr(count.abstract_batch(config, 4), field)
    assert (leaf is None) if sizes is None else leaf.shape == sizes


@pytest.mark.parametrize(
    ("packing", "one_segment"), [("best_fit", False), ("concat", False), ("stream", True), ("none", True)]
)
def test_the_batch_says_whether_rows_have_one_segment(packing, one_segment):
    """As the batches of training do, by the config alone: both compile the same program."""
    config = run_config.resolve("llama:tiny", (("model.vocab_size", "512"), ("data.packing", packing)))
    assert count.abstract_batch(config).one_segment is one_segment


BUFFERS = """BufferAssignment:
allocation 0: size 4096, color 8, page 0, preallocated-temp:
allocation 1: size 100, page 0, thread-local:
allocation 2: size 1000, page 0, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=1000,offset=0): f32[250]{0}
allocation 3: size 5000, page 0, preallocated-temp:
 value: <2 a @0> (size=3000,offset=0): f32[750]{0:T(8)}
 value: <3 b @0> (size=3000,offset=0): bf16[1500]{0}
 value: <4 c @0> (size=2000,offset=3000): f32[500]{0}
allocation 4: size 16, page 0, constant:
"""


def test_buffers_that_share_memory_count_once():
    memory, largest = compile_ahead.read_buffers(BUFFERS)
    assert (memory.arguments, memory.temporaries) == (1000, 5016)
    assert largest == [(3000, "f32[750], bf16[1500]"), (2000, "f32[500]")]
