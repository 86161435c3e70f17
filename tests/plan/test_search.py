"""The search over layouts, on plans that nothing compiled."""

import dataclasses

import pytest

from llmjax.errors import UserError
from llmjax.plan import plan as plans, search, topology as topologies
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


def test_the_search_adds_microbatches_until_a_policy_fits(monkeypatch):
    """Saving more is faster and larger; each microbatch halves the memory and costs 1%."""
    size = {"full": 20.0, "attention": 30.0, "dots_attention": 50.0}

    def fake(config, topology, folder, *, quick):
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
    def fake(config, topology, folder, *, quick):
        assert config.model.remat != "auto"
        return make_plan(config, V6E, seconds=1.0, gib=10.0)

    monkeypatch.setattr(plans, "make_plan", fake)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="auto"))
    ranked = search.search(config, V6E, quick=True, seconds=60)
    assert all("model.remat" in dict(candidate.overrides) for candidate in ranked)


def test_no_time_is_known_for_a_machine_without_cost_model():
    with pytest.raises(UserError, match="no cost model of cpu:8; choose v5e, v5p or v6e"):
        search.search(CONFIG, topologies.parse("cpu:8"), quick=True, seconds=1)
