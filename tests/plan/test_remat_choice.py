"""model.remat = "auto": the policy that the planner takes, on plans that nothing compiled and on real ones."""

import dataclasses
import importlib.util

import pytest

from llmjax.errors import UserError
from llmjax.nn.stack import REMAT
from llmjax.plan import plan as plans, remat_choice, topology as topologies
from llmjax.run import config as run_config
from tests.plan.fake_plan import make_plan

V6E, V4, CPU, GPU = (topologies.parse(name) for name in ("v6e:4x4", "v4:2x2x1", "cpu:4", "gpu"))
CONFIG = run_config.resolve("llama:8B", (("model.vocab_size", "128256"), ("model.remat", "auto")))
# GiB, and seconds of a step: those of llama:8B on v6e, 4 rows of 8,192 a chip.
STEPS = {
    "none": (285, 4.86),
    "full": (18, 4.28),
    "attention": (27, 3.84),
    "attention_qkv": (36, 4.10),
    "attention_mlp": (82, 3.93),
    "attention_qkv_mlp": (94, 3.90),
    "dots": (94, 4.29),
    "dots_attention": (102, 3.85),
    "offload_input": (20, 3.87),
    "offload": (11, 3.89),
}


@pytest.fixture
def compiled(monkeypatch):
    """The policies that were compiled, in order; their steps take STEPS times `scale` of memory."""

    class Compiled(list):
        scale = 1.0
        device_memory = None

    log = Compiled()

    def fake(config, topology, *, quick):
        assert quick
        policy = config.model.remat
        log.append(policy)
        gib, seconds = STEPS[policy]
        plan = make_plan(config, topology, seconds=seconds, gib=gib * log.scale)
        memory = dataclasses.replace(plan.program.memory, host=(28 if policy == "offload" else 0) << 30)
        program = dataclasses.replace(plan.program, memory=memory, device_memory=log.device_memory)
        has_time = topology is V6E
        return dataclasses.replace(plan, program=program, time=plan.time if has_time else None)

    monkeypatch.setattr(plans, "make_plan", fake)
    return log


def test_every_policy_is_tried_and_the_fastest_that_fits_is_taken(compiled):
    choice = remat_choice.choose_remat(CONFIG, V6E)
    assert set(compiled) == set(REMAT) == set(STEPS)
    assert (choice.policy, choice.fits) == ("attention", True)
    assert "the fastest of 4 that fit: 3.84 s a step predicted, 27.00 GiB of at most 29.68 GiB" in choice.reason
    refused = [line for line in choice.describe() if "refused for memory" in line]
    assert len(refused) == 6 and any("102.00 GiB" in line and "dots_attention" in line for line in refused)
    output = choice.to_json()
    assert output["policy"] == "attention" and output["tried"]["dots_attention"]["fits"] is False


def test_the_last_twentieth_of_the_memory_stays_free(compiled):
    """attention then takes 30.0 of 31.24 GiB: more than 95%."""
    compiled.scale = 30.0 / 27
    choice = remat_choice.choose_remat(CONFIG, V6E)
    assert choice.policy == "offload_input" and choice.tried["attention"].fits


def test_offloaded_tensors_must_fit_in_the_host(compiled, monkeypatch):
    compiled.scale = 2.0  # of the steps only offload's, of 22 GiB, fits
    assert remat_choice.choose_remat(CONFIG, V6E).policy == "offload"
    monkeypatch.setattr(remat_choice, "host_memory", lambda: 150 << 30)
    assert remat_choice.choose_remat(CONFIG, V6E, host_devices=4).fits  # 28 of 28.1 GiB each
    assert not remat_choice.choose_remat(CONFIG, V6E, host_devices=8).fits


def test_where_nothing_fits_the_smallest_is_named(compiled):
    compiled.scale = 10.0
    choice = remat_choice.choose_remat(CONFIG, V6E)
    assert (choice.policy, choice.fits) == ("offload", False)
    assert "no policy fits: 110.00 GiB of at most 29.68 GiB" in choice.reason


def test_without_a_predicted_time_the_first_that_fits_by_flops_is_taken(compiled, monkeypatch):
    assert remat_choice.choose_remat(CONFIG, V4).policy == "attention"
    assert compiled[0] == "none" and compiled[-1] == "attention" and "offload" not in compiled
    compiled.clear()
    monkeypatch.setattr(remat_choice, "host_memory", lambda: 100 << 30)
    choice = remat_choice.choose_remat(CONFIG, CPU)  # 18 of 75 / 4 GiB
    assert choice.policy == "full" and not {"offload", "offload_input"} & set(compiled)
    assert "75% of this host's memory over 4 devices" in choice.reason


def test_a_gpu_reports_its_memory(compiled):
    compiled.device_memory = 60 << 30
    assert remat_choice.choose_remat(CONFIG, GPU).policy == "attention_qkv"
    compiled.device_memory = None
    with pytest.raises(UserError, match="gpu does not tell how much memory it has"):
        remat_choice.choose_remat(CONFIG, GPU)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_small_step_on_tpu(monkeypatch):
    """It has room for any policy, so the fastest is taken. Three stand for all."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(remat_choice, "_ON_DEVICE", ("none",))
    monkeypatch.setattr(remat_choice, "_ON_HOST", ("offload",))
    small = {"model.vocab_size": 512, "model.num_layers": 2, "data.seq_len": 256, "model.dtype": "bfloat16"}
    config = run_config.resolve("llama:tiny", tuple((field, str(value)) for field, value in small.items()))
    choice = remat_choice.choose_remat(config, topologies.parse("v5e:2x2"))
    assert choice.fits and set(choice.tried) == {"none", "offload", "full"}
    assert choice.plan.step_seconds == min(plan.step_seconds or 1e9 for plan in choice.tried.values())
    assert choice.tried["offload"].program.memory.host > 0
    flops = {policy: plan.costs.executed_flops for policy, plan in choice.tried.items()}
    assert flops["none"] < flops["full"]
