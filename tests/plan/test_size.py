"""Choosing a size: the laws agree with themselves and with what was published; counts are those of real models."""

import pathlib

from flax import nnx
import jax
import numpy as np
import pytest

from llmjax.cli import main
from llmjax.models import registry
from llmjax.plan import budget as budgets, count, devices, size

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def test_the_scaling_laws_are_consistent():
    for flops in (1e18, 1e21, 1e24):
        budget = budgets.for_flops(flops)
        assert budget.flops == pytest.approx(flops)
        assert budgets.for_tokens(budget.tokens).parameters == pytest.approx(budget.parameters)
        assert budgets.for_parameters(budget.parameters).tokens == pytest.approx(budget.tokens)
        for other in (0.7, 1.4):  # the least loss for these FLOPs, on both sides
            moved = budgets.Budget(budget.parameters * other, budget.tokens / other)
            assert moved.flops == pytest.approx(flops) and moved.loss > budget.loss


def test_the_scaling_laws_reproduce_published_numbers():
    # The replication's abstract finds about 20 tokens a parameter, as Chinchilla was trained (70B on 1.4T).
    chinchilla = budgets.for_flops(5.76e23)
    assert 65e9 < chinchilla.parameters < 80e9 and 17 < chinchilla.tokens / chinchilla.parameters < 22
    # Step Law by hand for 1B parameters on 100B tokens: 1.79 * 10^(-0.713 * 9 + 0.307 * 11), 0.58 * 10^(0.571 * 11)
    step = budgets.Budget(1e9, 1e11)
    assert step.learning_rate == pytest.approx(1.79 * 10**-3.04, rel=1e-6)
    assert step.batch_tokens == pytest.approx(0.58 * 10**6.281, rel=1e-6)


@pytest.mark.parametrize("spec", ["quickstart.py", "llama.py:tiny"])
def test_the_parameter_count_is_that_of_the_initialised_model(spec):
    config = size.resolve(str(CONFIGS / spec), 500)
    params = jax.jit(lambda key: registry.init(config.model, key))(jax.random.key(0))
    real = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert registry.parameters_by_part(registry.abstract(config.model)[1]) == real


def test_flops_agree_with_the_count_of_the_compiler():
    """The forward pass of an unrolled model: matmuls are all but a few percent, and the mask hides half a product."""
    config = size.resolve(str(CONFIGS / "quickstart.py"), 4096, (("model.vocab_multiple", "1"),))
    model, seq = config.model, config.data.seq_len
    graph, shapes, _ = registry.abstract(model)
    batch = count.abstract_batch(config)

    def logits(params, batch):
        module = nnx.merge(graph, params)
        return module.unembed(module(batch).hidden)

    counted = jax.jit(logits).lower(shapes, batch).compile().cost_analysis()["flops"]
    forward = model.flops_per_token(seq) / 3 * seq
    hidden_half = 2 * model.num_layers * model.num_heads * model.head_size * seq * seq
    assert counted == pytest.approx(forward + hidden_half, rel=0.06)


@pytest.mark.parametrize("attention", ["dot", "blockwise"])
def test_each_remat_policy_keeps_what_its_name_says(attention):
    config = size.resolve(str(CONFIGS / "llama.py:tiny"), 500, (("model.attention", attention),))
    model, residuals = config.model, count.residual_bytes(config)
    token = 4 * model.num_layers * config.data.seq_len  # bytes of one float32 a token in every layer
    kept = {name: (bytes.device - residuals["full"].device) / token for name, bytes in residuals.items()}
    heads = model.num_heads * model.head_size
    out = heads + (model.num_heads if attention == "blockwise" else 0)  # with the logarithm of the softmax's sum
    qkv, gate_up = heads + 2 * model.kv_heads * model.head_size, 2 * model.mlp_size
    assert kept["attention"] == out
    assert kept["attention_qkv"] == out + qkv
    assert kept["attention_mlp"] == out + gate_up
    assert kept["attention_qkv_mlp"] == out + qkv + gate_up
    assert kept["dots"] == qkv + model.embed + gate_up  # the output of down is not needed again
    assert kept["dots_attention"] == kept["dots"] + out
    assert kept["none"] > kept["dots_attention"]
    assert kept["offload_input"] == out - model.embed and residuals["offload_input"].host == token * model.embed
    assert kept["offload"] == -model.embed and residuals["offload"].host == token * (model.embed + out + qkv)
    assert all(residuals[name].host == 0 for name in residuals if not name.startswith("offload"))


def test_remat_keeps_the_inner_outputs_of_every_expert_of_a_token():
    config = size.resolve(str(CONFIGS / "mixtral.py:tiny"), 500)
    model, residuals = config.model, count.residual_bytes(config)
    pairs = 4 * model.num_layers * config.data.seq_len * model.experts_per_token
    kept = {name: (bytes.device - residuals["attention"].device) / pairs for name, bytes in residuals.items()}
    assert kept["attention_mlp"] == 2 * model.expert_size


def test_adamw_needs_sixteen_bytes_per_parameter():
    config = size.resolve(str(CONFIGS / "quickstart.py"), 500)
    assert count.state_bytes_per_parameter(config.model, config.optimizer) == pytest.approx(16, rel=1e-4)


def test_the_nearest_config_to_7e9_parameters_is_llama_8b():
    spec, parameters = size.nearest_config(7e9)
    assert spec == "llama:8B" and 7e9 < parameters < 8.1e9


def test_the_peak_of_this_machine_is_measured():
    assert devices.find("here").peak > 1e9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --flops, --budget_hours"),
        (["--flops=0"], "=0.0: must be from 1 to 1e"),
        (["--tokens=1e300"], "must be from 1 to 1e"),
        (["--config=configs/quickstart.py", "--config.data.seq_len=0"], "data.seq_len=0: must be at least 1"),
        (["--flops=1e20", "--budget_hours=3"], "both set the FLOPs"),
        (["--flops=1e20", "--tokens=1e9", "--parameters=1e9"], "over-determine the size"),
        (["--flops=1e20", "--device=v7"], "--device=v7.*: choose one of"),
        (["--flops=1e20", "--mfu=1.5"], "--mfu=1.5"),
        (["--flops=1e20", "--config=configs/quickstart.py"], "set only one of them"),
        (["--flops=1e20", "--config.train.steps=3"], "needs --config"),
    ],
)
def test_bad_flags_are_refused(arguments, words):
    with pytest.raises(main.UserError, match=words):
        main.run(["size", *arguments])


def test_the_output_names_flops_time_and_parameters(capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert main.run(["size", "--budget_hours=24", "--device=h100", "--devices=8"]) == 0
    printed = capsys.readouterr().out
    flops = 24 * 3600 * 8 * 989e12 * 0.4
    assert f"{flops:.3g} FLOPs" in printed and "24.0 hours" in printed and "nearest config: qwen3:1.7B," in printed
    assert main.run(["size", "--config=configs/llama.py:8B", "--vocab_size=128256"]) == 0
    printed = capsys.readouterr().out
    assert "8,030,261,248 parameters" in printed and "<- this config" in printed
    assert np.all([name in printed for name in ("blocks", "embed", "head", "16.00 bytes")])
