"""The search over layouts, on plans that nothing compiled."""

import dataclasses

import pytest

from llmjax.errors import UserError
from llmjax.plan import plan as plans, search, topology as topologies
from llmjax.plan.costs import Costs, KernelWork
from llmjax.run import config as run_config
from tests.plan.fake_plan import make_plan

V6E = topologies.parse("v6e:4x4")
CONFIG = run_config.resolve("llama:8B", (("model.vocab_size", "128256"), ("train.global_batch", "64")))


def test_meshes_fill_the_machine_and_hold_the_state():
    """16 bytes a parameter: 120 GiB over 16 chips of 31.24 GiB need at least 5 shards."""
    found = [dict(mesh) for mesh in search.meshes(CONFIG, V6E)]
    assert {"mesh.slice": 1, "mesh.data": 1, "mesh.fsdp": 16, "mesh.expert": 1, "mesh.tensor": 1} in found
    for mesh in found:
        assert mesh["mesh.data"] * mesh["mesh.fsdp"] * mesh["mesh.tensor"] == 16
        assert mesh["mesh.fsdp"] * mesh["mesh.tensor"] > 4


@pytest.mark.parametrize("name", ["v6e:4x4", "v6e:16x16", "v5p:4x4x8"])
def test_meshes_can_be_laid_on_the_torus(name):
    """JAX lays an axis along whole dimensions: of 16x16 chips no axis can have 4."""
    topology = topologies.parse(name)
    config = run_config.with_fields(CONFIG, (("train.global_batch", 1024),))
    sizes = {dict(mesh)["mesh.fsdp"] for mesh in search.meshes(config, topology)}
    assert sizes == {"v6e:4x4": {4, 16}, "v6e:16x16": {16, 256}, "v5p:4x4x8": {1, 4, 8, 16, 32, 128}}[name]


def test_the_search_adds_microbatches_until_a_policy_fits(monkeypatch):
    """Saving more is faster and larger; each microbatch halves the memory and costs 1%."""
    size = {"full": 20.0, "attention": 30.0, "dots_attention": 50.0}

    def fake(config, topology, *, quick):
        rows = 1 / config.train.accumulation
        seconds = (100 / size.get(config.model.remat, 10.0)) * (1 + 0.01 * config.train.accumulation)
        return make_plan(
            config, V6E, seconds=seconds * config.mesh.tensor, gib=size.get(config.model.remat, 90.0) * rows
        )

    monkeypatch.setattr(plans, "make_plan", fake)
    ranked = search.search(CONFIG, V6E, quick=True, seconds=60)
    best = dict(ranked[0].overrides)
    assert (best["model.remat"], best["train.accumulation"], best["mesh.tensor"]) == ("dots_attention", 2, 1)
    front = search.pareto(ranked)
    memories = [candidate.plan.program.memory.total for candidate in front]
    assert front[0] is ranked[0] and memories == sorted(memories, reverse=True)
    assert "--config.model.remat=dots_attention" in search.describe(ranked, "llama:8B")[-1]


def test_auto_is_replaced_by_policies(monkeypatch):
    def fake(config, topology, *, quick):
        assert config.model.remat != "auto"
        return make_plan(config, V6E, seconds=1.0, gib=10.0)

    monkeypatch.setattr(plans, "make_plan", fake)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="auto"))
    ranked = search.search(config, V6E, quick=True, seconds=60)
    assert all("model.remat" in dict(candidate.overrides) for candidate in ranked)


def test_blocks_are_tried_in_the_best_layouts(monkeypatch):
    """Larger blocks are faster here; of those that divide rows of 3,072 tokens 1,024 is the largest."""

    def fake(config, topology, *, quick):
        block = config.model.attention_block or 256
        plan = make_plan(config, V6E, seconds=1 + 1 / block + config.mesh.tensor, gib=10.0)
        return dataclasses.replace(plan, costs=Costs(attention={"splash_mha_fwd": KernelWork()}))

    monkeypatch.setattr(plans, "make_plan", fake)
    config = run_config.with_fields(CONFIG, (("data.seq_len", 3072),))
    ranked = search.search(config, V6E, quick=True, seconds=60)
    assert dict(ranked[0].overrides)["model.attention_block"] == 1024
    assert "--config.model.attention_block=1024" in ranked[0].as_flags()
    assert 2048 not in [dict(candidate.overrides).get("model.attention_block") for candidate in ranked]


def test_a_kernel_that_needs_too_much_vmem_is_not_tried(monkeypatch):
    """Blocks of 2,048 need 40 MiB or more, which the option must allow: the quick depth would not see the refusal."""
    seen = []

    def fake(config, topology, *, quick):
        seen.append(config.model.attention_block)
        plan = make_plan(config, V6E, seconds=1.0, gib=10.0)
        return dataclasses.replace(plan, costs=Costs(attention={"splash_mha_fwd": KernelWork()}))

    monkeypatch.setattr(plans, "make_plan", fake)
    config = run_config.with_fields(CONFIG, (("xla.flags", (("xla_tpu_scoped_vmem_limit_kib", "32768"),)),))
    search.search(config, V6E, quick=True, seconds=60)
    assert set(seen) == {0, 512, 1024}


def test_meshes_that_cut_matmuls_further_are_left_out_once_slower(monkeypatch):
    def fake(config, topology, *, quick):
        return make_plan(config, V6E, seconds=float(config.mesh.tensor), gib=10.0)

    monkeypatch.setattr(plans, "make_plan", fake)
    ranked = search.search(CONFIG, V6E, quick=True, seconds=60)
    assert {dict(candidate.overrides)["mesh.tensor"] for candidate in ranked} == {1, 4}


def test_microbatches_that_cannot_be_enough_are_not_compiled(monkeypatch):
    """90 GiB of temporaries over 2 microbatches are still more than 31.24 GiB; over 4 they fit."""
    tried = []

    def fake(config, topology, *, quick):
        tried.append((config.model.remat, config.train.accumulation))
        gib = 90.0 if config.model.remat == "none" else 10.0
        return make_plan(config, V6E, seconds=1.0, gib=gib / config.train.accumulation)

    monkeypatch.setattr(plans, "make_plan", fake)
    search.search(CONFIG, V6E, quick=True, seconds=60)
    assert {accumulation for remat, accumulation in tried if remat == "none"} == {1, 4}


def test_no_time_is_known_for_a_machine_without_cost_model():
    with pytest.raises(UserError, match="no cost model of cpu:8; choose v5e, v5p or v6e"):
        search.search(CONFIG, topologies.parse("cpu:8"), quick=True, seconds=1)
