"""The reader of HLO text, against programs whose FLOPs, iterations and traffic are known by formula."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from llmjax.plan import costs, matmuls, predict, traffic
from llmjax.plan.hlo import Module
from llmjax.plan.topology import CHIPS


def compile_text(function, *shapes, **kwargs) -> str:
    return jax.jit(function, **kwargs).lower(*shapes).compile().as_text()


def shape(*dims, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


def test_matmuls_inside_a_scan_count_with_its_iterations():
    def layers(x, weights):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    text = compile_text(layers, shape(16, 64), shape(5, 64, 64))
    assert costs.count(Module(text), [0]).matmul_flops == 5 * 2 * 16 * 64 * 64


def test_batched_products_and_their_gradients():
    def scores(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k).sum()

    q = shape(2, 8, 3, 16)
    text = compile_text(jax.grad(lambda q, k: scores(q, k) ** 2, argnums=(0, 1)), q, q)
    assert costs.count(Module(text), [0]).matmul_flops == 3 * 2 * 2 * 3 * 8 * 8 * 16


def test_the_iterations_of_a_loop_follow_from_its_counter():
    """As in TPU programs, which do not write them: a count down, a step of 3, and a bound from outside the loop."""

    def loop(x):
        x = jax.lax.while_loop(lambda c: c[0] > 2, lambda c: (c[0] - 1, c[1] @ c[1]), (9, x))[1]
        return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 3, c[1] @ c[1]), (0, x))[1]

    text = compile_text(loop, shape(8, 8))
    unwritten = text.replace("known_trip_count", "unknown")
    assert "known_trip_count" in text
    for program in (text, unwritten):
        module = Module(program)
        loops = [i for i in module.instructions.values() if i.opcode == "while"]
        assert [module.trip_count(i) for i in loops] == [7, 4]
        assert not module.unknown_loops


def test_a_loop_that_depends_on_data_is_named():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x / 2, x)

    counted = costs.count(Module(compile_text(halve, shape(8))), [0])
    assert any("depends on data" in note for note in counted.notes)


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_collectives_send_what_a_ring_sends(mesh):
    """all-gather and reduce-scatter (n-1)/n of the whole, all-reduce twice that, over the axes that they name."""
    size = 64 * 64 * 4

    def run(body, in_spec, out_spec):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
        text = compile_text(mapped, shape(64, 64, sharding=NamedSharding(mesh, in_spec)))
        return costs.count(Module(text), [0] * 8).collectives

    gathered = run(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True) + 1, P("fsdp"), P())
    assert gathered["all-gather"].ici_bytes == size * 3 / 4
    reduced = run(lambda x: jax.lax.psum(x, ("data", "fsdp")), P(), P())
    assert reduced["all-reduce"].ici_bytes == 2 * size * 7 / 8
    scattered = run(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), P("data"))
    assert sum(total.ici_bytes for total in scattered.values()) in (size / 2, size)  # or as an all-reduce and a slice
    moved = run(lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), P("fsdp"), P("fsdp"))
    assert moved["collective-permute"].ici_bytes == size / 4


def test_bytes_between_slices_are_those_of_a_reduction_in_each_slice_first():
    """Over 2 slices of 4 chips a whole of B bytes: all-reduce sends 2 B 3/4 inside, then 2 (B / 4) / 2 across."""
    program = """HloModule m

add {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  ROOT %r = f32[1024]{0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}
"""
    counted = costs.count(Module(program), [0, 0, 0, 0, 1, 1, 1, 1])
    assert counted.ici_bytes == 2 * 4096 * 3 / 4
    assert counted.dcn_bytes == 2 * (4096 / 4) / 2


def test_what_the_runtime_sends_between_slices():
    text = """ENTRY %main {
  %x = bf16[64,128]{1,0} parameter(0)
  %t = token[] after-all()
  ROOT %s = (bf16[64,128]{1,0}, u32[]{:S(2)}, token[]) send(%x, %t), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501
    counted = costs.count(Module(text), [0, 1])
    assert (counted.ici_bytes, counted.dcn_bytes) == (0, 64 * 128 * 2)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_each_notation(written, expected):
    text = f"ENTRY %main {{\n  %x = f32[8]{{0}} parameter(0)\n  ROOT %r = f32[8]{{0}} all-reduce(%x), replica_groups={written}, use_global_device_ids=true\n}}\n"  # noqa: E501
    assert sorted(traffic.replica_groups(Module(text).instructions["r"], 4)) == expected


def test_a_matmul_that_a_tpu_writes_as_a_dilated_convolution():
    """8 batches of [32, 16] x [128, 16]: the batch became a window in which one of eight positions reads an input."""
    text = """ENTRY %main {
  %a = bf16[8,32,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,128,16]{2,1,0} parameter(1)
  ROOT %c = f32[8,32,128]{2,1,0:T(8,128)} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501
    module = Module(text)
    assert matmuls.matmul_flops(module, module.instructions["c"]) == 2 * 8 * 32 * 128 * 16


@pytest.mark.parametrize(("dtype", "speed"), [("s8", 2), ("f8e4m3fn", 1), ("bf16", 1)])
def test_matmuls_of_int8_take_half_the_time_on_v5e(dtype, speed):
    text = f"""ENTRY %main {{
  %a = {dtype}[8,128]{{1,0}} parameter(0)
  %b = {dtype}[128,16]{{1,0}} parameter(1)
  ROOT %c = s32[8,16]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}
"""
    counted, chip = costs.count(Module(text), [0]), CHIPS["v5e"]
    flops = 2 * 8 * 128 * 16
    assert (counted.matmul_flops, counted.int8_flops) == (flops, flops if dtype == "s8" else 0)
    assert predict.estimate(counted, chip).matmul == pytest.approx(flops / (0.8 * chip.peak) / speed)


def test_splash_attention_counts_the_blocks_that_its_mask_executes():
    """4 of a grid of 2 x 3 blocks, for 2 rows of 4 heads; the text of a kernel goes over several lines."""
    text = """ENTRY %main {
  %next = s8[1,2,3]{2,1,0} constant({ { {0, 1, 0}, {0, 1, 2} } })
  %mask = s8[1,2,3]{2,1,0:T(8,128)(4,1)} constant({ { {1, 0, 0}, {2, 2, 1} } })
  %copy-start = (s8[1,2,3]{2,1,0:S(1)}, s8[1,2,3]{2,1,0}, u32[]{:S(2)}) copy-start(%mask)
  %copy-done = s8[1,2,3]{2,1,0:S(1)} copy-done(%copy-start)
  %q = bf16[2,4,256,64]{3,2,1,0} parameter(0)
  %k = bf16[2,2,384,64]{3,2,1,0} parameter(1)
  %v = bf16[2,2,384,32]{3,2,1,0} parameter(2)
  ROOT %splash_mha_fwd_segmented.3 = bf16[2,4,256,32]{3,2,1,0} custom-call(%next, %copy-done, %q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128, \\"use_fused_bwd_kernel\\": true}"
}}, metadata={op_name="jit(f)/splash"}
}
"""  # noqa: E501
    counted = costs.count(Module(text), [0])
    work = counted.attention["splash_mha_fwd_segmented"]
    assert work.elements == 4 * 128 * 128 * 2 * 4
    assert work.flops == work.elements * 2 * (64 + 32)
    assert (work.grid_steps, work.rows) == (6 * 8, 2 * 4 * 256)
    assert counted.attention_calls == 1


def test_splash_attention_on_a_shared_row_counts_the_average_of_its_devices():
    """Each of two devices cuts its 2 x 3 blocks out of the mask of both; they execute 3 and 5 blocks."""
    text = """%cut {
  %whole = s8[1,4,3]{2,1,0} parameter(0)
  %first = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = s8[1,2,3]{2,1,0} dynamic-slice(%whole, %zero, %first, %zero), dynamic_slice_sizes={1,2,3}
  ROOT %copy = s8[1,2,3]{2,1,0} copy(%slice)
}
ENTRY %main {
  %all = s8[1,4,3]{2,1,0} constant({ { {1, 0, 0}, {2, 1, 0}, {2, 1, 0}, {2, 2, 1} } })
  %at = s32[] parameter(0)
  %mask = s8[1,2,3]{2,1,0} fusion(%all, %at), kind=kLoop, calls=%cut
  %q = bf16[4,256,64]{2,1,0} parameter(1)
  %k = bf16[4,384,64]{2,1,0} parameter(2)
  %v = bf16[4,384,64]{2,1,0} parameter(3)
  ROOT %splash_mha_fwd.1 = bf16[4,256,64]{2,1,0} custom-call(%mask, %mask, %q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128}"
}}
}
"""  # noqa: E501
    work = costs.count(Module(text), [0, 0]).attention["splash_mha_fwd"]
    assert (work.elements, work.grid_steps) == ((3 + 5) / 2 * 128 * 128 * 4, 6 * 4)


def test_grouped_matmuls_count_every_row_once():
    text = """ENTRY %main {
  %sizes = s32[4]{0} parameter(0)
  %x = bf16[96,64]{1,0} parameter(1)
  %w = bf16[4,64,128]{2,1,0} parameter(2)
  %g = bf16[96,128]{1,0} custom-call(%sizes, %x, %w), custom_call_target="tpu_custom_call"
  %ragged-dot-none.1 = bf16[96,128]{1,0} custom-call(%sizes, %x, %w), custom_call_target="tpu_custom_call"
  ROOT %ragged-dot-none.2 = bf16[4,64,128]{2,1,0} custom-call(%sizes, %x, %g), custom_call_target="tpu_custom_call"
}
"""
    assert costs.count(Module(text), [0]).grouped_flops == 2 * (2 * 96 * 64 * 128)


def test_copies_to_the_host_count_in_both_directions():
    text = """ENTRY %main {
  %x = bf16[8,128]{1,0} parameter(0)
  %out = (bf16[8,128]{1,0:S(5)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %held = bf16[8,128]{1,0:S(5)} copy-done(%out)
  %in = (bf16[8,128]{1,0}, bf16[8,128]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%held)
  ROOT %back = bf16[8,128]{1,0} copy-done(%in)
}
"""
    counted = costs.count(Module(text), [0])
    assert (counted.host_bytes, counted.largest_host_copy) == (2 * 2048, 2048)
