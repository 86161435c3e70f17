"""Rules in both directions: layers, experts, joined tensors, layers without a tensor, padding."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.interop import exporting
from llmjax.interop.hf_checkpoint import ARCHITECTURES
from llmjax.interop.mapping import ParamMapping, Rule
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.run import config as run_config
from tests import jobs
from tests.interop import published, state_dicts
from tests.interop.state_dicts import InMemory

CONFIG = DecoderConfig(vocab_size=300, embed=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp=48, max_positions=64)
RULES = ARCHITECTURES["LlamaForCausalLM"].rules(CONFIG)


def test_slices_of_parameters_equal_slices_of_the_full_ones():
    """Whatever a shard needs, padding of the vocabulary included."""
    table, source = ParamMapping(RULES, CONFIG), InMemory(published.random_tensors(published.llama_shapes()))
    rng = np.random.default_rng(0)
    for name, leaf in table.shapes.items():
        full = table.read(name, tuple(slice(0, size) for size in leaf.shape), source)
        for _ in range(10):
            ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in leaf.shape]
            index = tuple(slice(*pair) for pair in ends)
            np.testing.assert_array_equal(table.read(name, index, source), full[index])


def test_load_and_dump_are_inverse():
    tensors = published.random_tensors(published.llama_shapes())
    params = state_dicts.load(RULES, tensors, CONFIG)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, registry.abstract(CONFIG)[1])
    back = state_dicts.dump(RULES, params, CONFIG)
    assert set(back) == set(tensors)
    assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())


def test_scan_does_not_change_results():
    unrolled = dataclasses.replace(CONFIG, scan=False)
    tensors = published.random_tensors(published.llama_shapes())
    one, other = (state_dicts.load(RULES, tensors, config) for config in (CONFIG, unrolled))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_layers_may_have_other_numbers_or_no_tensor():
    """Here the first layer has no feed-forward norm on disk, and the others are counted from 10."""
    name = "model.layers.{layer}.post_attention_layernorm.weight"
    rules = [dataclasses.replace(r, layers=(None, 10, 11), default=7.0) if r.hf_name == name else r for r in RULES]
    tensors = published.random_tensors(published.llama_shapes())
    moved = {old: tensors.pop(name.format(layer=old)) for old in range(3)}
    tensors |= {name.format(layer=9 + old): moved[old] for old in (1, 2)}
    params = state_dicts.load(rules, tensors, CONFIG)
    scale = np.asarray(params["blocks"]["mlp_norm"]["scale"])
    np.testing.assert_array_equal(scale[0], 7.0)
    np.testing.assert_array_equal(scale[1:], [moved[1], moved[2]])
    back = state_dicts.dump(rules, params, CONFIG)
    assert set(back) == set(tensors)


@pytest.mark.parametrize("change", ["unknown", "twice", "forgotten"])
def test_invalid_rules_are_detected(change):
    rules = {
        "unknown": [*RULES, Rule("x", ("blocks.nothing",))],
        "twice": [*RULES, dataclasses.replace(RULES[0], hf_name="x", aliases=())],
        "forgotten": RULES[1:],
    }[change]
    with pytest.raises(AssertionError):
        ParamMapping(rules, CONFIG)


def test_the_first_class_that_expresses_a_model_is_chosen():
    assert exporting.choose_class(CONFIG)[0] == "LlamaForCausalLM"
    gpt2 = dataclasses.replace(
        CONFIG, num_kv_heads=0, norm="layernorm", positions="learned", biases="all", gated=False, activation="gelu"
    )
    assert exporting.choose_class(gpt2)[0] == "GPT2LMHeadModel"


RECIPES = {
    "quickstart": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "Gemma3ForCausalLM",
    "olmo": "Olmo3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek": "DeepseekV3ForCausalLM",
    "bert": "BertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}


def _recipe(name, **changes):
    model = run_config.resolve(str(jobs.ROOT / "configs" / f"{name}.py"), []).model
    return dataclasses.replace(model, vocab_size=model.vocab_size or 300, **changes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_trains_can_be_exported(recipe):
    assert exporting.choose_class(_recipe(recipe))[0] == RECIPES[recipe]


IDLE = {
    "a width for another parametrization": ("llama", {"base_embed": 64}),
    "the same of an encoder": ("bert", {"base_embed": 64}),
    "the same of an encoder-decoder": ("t5", {"base_embed": 64}),
    "the same of a mixture": ("mixtral", {"base_embed": 64}),
    "a pattern without a window": ("llama", {"window": 0, "attention_pattern": "lg"}),
    "a pattern written out": ("qwen3", {"window": 16, "attention_pattern": "lglg"}),
    "a window of no layer": ("qwen3", {"window": 16, "attention_pattern": "g"}),
    "a pattern of gpt-oss without a window": ("gpt_oss", {"window": 0}),
    "a rotary base with learned positions": ("gpt2", {"rope_base": 5e5}),
    "a rotary base of a BERT": ("bert", {"rope_base": 5e5, "attention_pattern": "gllll"}),
    "a pattern of ModernBERT without a window": ("modernbert", {"window": 0, "rope_local_base": 0.0}),
    "bounds of YaRN that 0 leaves to the paper": (
        "llama",
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 64},
    ),
}


@pytest.mark.parametrize("case", IDLE)
def test_fields_without_effect_do_not_prevent_export(case):
    recipe, changes = IDLE[case]
    assert exporting.choose_class(_recipe(recipe, **changes), RECIPES[recipe])[0] == RECIPES[recipe]


def test_fields_with_effect_are_compared():
    with pytest.raises(UserError, match=r"model\.parametrization='mup'"):
        exporting.choose_class(_recipe("llama", parametrization="mup", base_embed=64))
    for changes in ({"attention_pattern": "gl"}, {"window": 8}, {"window": 0}, {"attention_pattern": "g"}):
        model = _recipe("qwen3", window=16, attention_pattern="lg")
        other = dataclasses.asdict(dataclasses.replace(model, **changes))
        assert "cannot express" in exporting._first_difference(model, other, ())


def test_a_class_with_a_window_cannot_express_a_model_without_one():
    """window=0 means no window: a class that always has one cannot express it."""
    windowed = dataclasses.replace(CONFIG, window=16)
    assert (
        exporting._first_difference(dataclasses.replace(CONFIG, window=0), {**dataclasses.asdict(windowed)}, ()) != ""
    )


def test_a_model_that_no_class_expresses_is_refused_by_field():
    with pytest.raises(UserError, match=r"no class of transformers.*LlamaForCausalLM.*: .*'relu2' is not supported"):
        exporting.choose_class(dataclasses.replace(CONFIG, activation="relu2"))


def test_fields_derived_from_0_are_compared_by_value():
    """num_kv_heads=0 and mlp=0 are derived sizes: the derived values are written and read back."""
    name, _, hf = exporting.choose_class(dataclasses.replace(CONFIG, num_kv_heads=0, mlp=0))
    assert name == "LlamaForCausalLM" and hf["num_key_value_heads"] == 4 and hf["intermediate_size"] == 128


def test_null_disables_the_window_of_qwen3():
    read = ARCHITECTURES["Qwen3ForCausalLM"].read_config
    sizes = {name: published.LLAMA[name] for name in published.LLAMA if name != "rope_theta"}
    assert read({**sizes, "use_sliding_window": None}) == read({**sizes, "use_sliding_window": False})
