"""The TPU compiler's program copies what remat policies offload once to the host and once back, and nothing else."""

import pytest

from llmjax.plan import compile_ahead, costs, topology
from llmjax.plan.hlo import HOST_SPACE, Module
from llmjax.run import config as run_config

LAYERS, SEQ, EMBED, HEADS, KV_HEADS, HEAD_DIM = 4, 1024, 1024, 8, 2, 128
SIZES = {
    "model.vocab_size": 2048,
    "model.num_layers": LAYERS,
    "model.embed": EMBED,
    "model.mlp": 2048,
    "model.num_heads": HEADS,
    "model.num_kv_heads": KV_HEADS,
    "model.attention": "blockwise",
    "data.seq_len": SEQ,
    "train.global_batch": 4,  # one row a chip
}


def test_offloaded_tensors_are_copied_to_the_host_once_and_back_once(tmp_path, monkeypatch):
    """A copy that only changes the layout of a stack would move all layers to the device and to the host again."""
    pytest.importorskip("libtpu", reason="compiles for a TPU: pip install libtpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    overrides = tuple((field, str(value)) for field, value in (SIZES | {"model.remat": "offload"}).items())
    config = run_config.resolve("llama:8B", overrides)
    program = compile_ahead.compile_ahead(config, topology.parse("v6e:2x2"), tmp_path, quick=True)
    module = Module(program.optimized)
    # The input, queries, the output of attention, keys and values in bfloat16; float32 logarithms of softmax sums.
    token = 2 * (EMBED + (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM) + 4 * HEADS
    assert program.memory.host == LAYERS * SEQ * token
    assert costs.count(module, program.slice_of).host_bytes == 2 * LAYERS * SEQ * token
    for instruction in module.instructions.values():
        if instruction.opcode in ("copy", "copy-start", "transpose"):
            source = module.operand(instruction, 0)
            host = [array for array in (source, *instruction.arrays[:1]) if array.space == HOST_SPACE]
            assert len(host) < 2, f"{instruction.name} copies {source} inside the host's memory"
