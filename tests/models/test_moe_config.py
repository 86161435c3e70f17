"""Published parameter counts, total and active for one token, and the recipes that use the shapes."""

import dataclasses
import pathlib

import pytest

from llmjax.binding import bind, load_module
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.moe import MoeConfig

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def model(name: str, size: str, vocab: int) -> MoeConfig:
    config = bind(MoeConfig, load_module(CONFIGS / f"{name}.py").get_config(size).to_dict()["model"])
    return dataclasses.replace(config, vocab_size=vocab, vocab_multiple=1)


# In billions, as their papers round them. OpenAI leaves the embedding out of the active ones.
@pytest.mark.parametrize(
    ("name", "size", "vocab", "total", "active"),
    [
        ("mixtral", "8x7B", 32000, 46.7, 12.9),
        ("mixtral", "8x22B", 32000, 140.6, 39.2),
        ("qwen3_moe", "30B", 151936, 30.5, 3.4),
        ("qwen3_moe", "235B", 151936, 235.1, 22.2),
        ("gpt_oss", "20B", 201088, 20.91, 3.61),
        ("gpt_oss", "120B", 201088, 116.83, 5.13),
        ("deepseek", "16B", 163840, 15.96, 2.91),
        ("deepseek", "671B", 129280, 671.03, 37.55),
    ],
)
def test_published_parameter_counts(name, size, vocab, total, active):
    config = model(name, size, vocab)
    count = registry.count_parameters(config)
    met = count - config.inactive_params - (vocab * config.embed if name == "gpt_oss" else 0)
    digits = len(str(total).partition(".")[2])
    assert (round(count / 1e9, digits), round(met / 1e9, digits)) == (total, active)


def test_exact_counts_of_published_files():
    assert registry.count_parameters(model("mixtral", "8x7B", 32000)) == 46_702_792_704
    assert registry.count_parameters(model("qwen3_moe", "30B", 151936)) == 30_532_122_624


def test_error_names_sizes_that_tensor_parallelism_cannot_split():
    config = model("deepseek", "671B", 129280)
    config.check(seq_len=64, tensor=8)
    with pytest.raises(UserError, match=r"mesh.tensor=3: must divide model.num_heads=128"):
        config.check(seq_len=64, tensor=3)
    with pytest.raises(UserError, match=r"mesh.tensor=4: must divide model.expert_mlp=6"):
        MoeConfig(num_heads=4, expert_mlp=6).check(seq_len=64, tensor=4)


def test_the_experts_must_fit_the_mesh():
    MoeConfig(num_experts=6).check_mesh({"expert": 3, "sequence": 2})
    with pytest.raises(UserError, match=r"mesh.expert=4: must divide model.num_experts=6"):
        MoeConfig(num_experts=6).check_mesh({"expert": 4})
