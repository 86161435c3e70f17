"""Adapters written as PEFT does and read back: the same function, for layers that are fused and transposed there."""

import dataclasses
import json

from etils import epath
import jax
import numpy as np
import pytest

from llmjax.checkpoint.manager import Checkpoints
from llmjax.errors import UserError
from llmjax.interop import exporting, importing, peft
from llmjax.interop.hf_checkpoint import ARCHITECTURES
from llmjax.interop.mapping import ParamMapping, flatten
from llmjax.models import registry
from llmjax.nn.lora import LoraConfig
from llmjax.parallel import axes
from llmjax.run import loading, state as states
from tests.interop import published
from tests.train.trainer import one_device

LORA = LoraConfig(rank=2, alpha=3.0, layers=("blocks.attention", "blocks.mlp.down"))


def read_model(hf: dict, name: str):
    """(config, table) of a published architecture."""
    from llmjax.binding import bind
    from llmjax.models.decoder_config import DecoderConfig

    model = bind(DecoderConfig, {"family": "decoder", **ARCHITECTURES[name].read_config(hf)}, "model")
    return model, ParamMapping(ARCHITECTURES[name].rules(model), model)


def random_params(model):
    rng = np.random.default_rng(0)
    params = registry.init(model, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("hf", "name"), [(published.LLAMA, "LlamaForCausalLM"), (published.GPT2, "GPT2LMHeadModel")])
def test_adapters_round_trip(tmp_path, hf, name, dora):
    """The merged weights are equal; the ranks of a fused layer are those of its parts side by side."""
    model, table = read_model(hf, name)
    adapted = dataclasses.replace(model, lora=dataclasses.replace(LORA, dora=dora))
    params = random_params(adapted)
    with axes.use_mesh(one_device()):
        peft.write(tmp_path, adapted, params, table, name, "base")
        base = {key: leaf for key, leaf in flatten(params).items() if key in table.shapes}
        back, back_params = peft.read(tmp_path, model, table.unflatten(base), table)
        expected = flatten(jax.device_get(states.merge_adapters(adapted, params)))
        actual = flatten(jax.device_get(states.merge_adapters(back, back_params)))
    settings = json.loads((tmp_path / peft.CONFIG).read_text())
    fused = name.startswith("GPT2")
    assert settings["fan_in_fan_out"] is fused
    assert settings["rank_pattern"] == (
        {f"transformer.h.{layer}.attn.c_attn": 6 for layer in range(published.LAYERS)} if fused else {}
    )
    assert back.lora.rank == (6 if fused else 2) and back.lora.dora is dora
    for key, leaf in expected.items():
        # The same products in another order, with added zeros.
        np.testing.assert_allclose(actual[key], leaf, atol=1e-6, err_msg=key)


def test_a_published_checkpoint_with_an_adapter_is_imported_and_written_again(tmp_path):
    model, table = read_model(published.LLAMA, "LlamaForCausalLM")
    adapted = dataclasses.replace(model, lora=LORA)
    (tmp_path / "adapter").mkdir()
    with axes.use_mesh(one_device()):
        peft.write(tmp_path / "adapter", adapted, random_params(adapted), table, "LlamaForCausalLM", "base")
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors)
    workdir = epath.Path(tmp_path / "run")
    importing.import_checkpoint(source, workdir, adapter=tmp_path / "adapter")
    with loading.load(workdir) as loaded:
        assert loaded.config.model.lora.rank == 2
    exporting.export_adapter(workdir, tmp_path / "out")
    read = lambda folder: published.files.read_header(folder / peft.TENSORS)
    before, after = read(tmp_path / "adapter"), read(tmp_path / "out")
    assert set(before) == set(after)
    assert all(published.same_bits(before[name].read(), after[name].read()) for name in before)
    exporting.export(workdir, tmp_path / "merged")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (before[f"base_model.model.{name}.lora_{x}.weight"].read() for x in "AB")
    merged = published.read_tensors(tmp_path / "merged")[f"{name}.weight"]
    np.testing.assert_allclose(merged, tensors[f"{name}.weight"] + 1.5 * b @ a, atol=1e-6)
    assert Checkpoints(workdir / "checkpoints").read_meta(0)["config"]["model"]["lora"]["rank"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type='IA3' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not supported"),
        ({"use_dora": True}, r"lora_magnitude_vector is missing"),
        ({"r": "many"}, r"r and lora_alpha must be numbers"),
    ],
)
def test_adapters_that_are_not_supported_are_refused(tmp_path, change, message):
    model, table = read_model(published.LLAMA, "LlamaForCausalLM")
    adapted = dataclasses.replace(model, lora=LORA)
    with axes.use_mesh(one_device()):
        peft.write(tmp_path, adapted, random_params(adapted), table, "LlamaForCausalLM", "base")
        settings = json.loads((tmp_path / peft.CONFIG).read_text())
        (tmp_path / peft.CONFIG).write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=message):
            peft.read(tmp_path, model, registry.init(model, jax.random.key(0)), table)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model, table = read_model(published.LLAMA, "LlamaForCausalLM")
    other, other_table = read_model(published.GPT2, "GPT2LMHeadModel")
    adapted = dataclasses.replace(other, lora=LORA)
    with axes.use_mesh(one_device()):
        peft.write(tmp_path, adapted, random_params(adapted), other_table, "GPT2LMHeadModel", "base")
        with pytest.raises(UserError, match=r"transformer.h.0.attn.c_attn.lora_A.weight belongs to no linear layer"):
            peft.read(tmp_path, model, registry.init(model, jax.random.key(0)), table)


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors)
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(UserError, match=r"model.lora.rank=2: set it when you train"):
        importing.import_checkpoint(source, workdir, overrides=[("model.lora.rank", "2")])
    importing.import_checkpoint(source, workdir)
    with pytest.raises(UserError, match=r"--adapter: step 0 of .* has no adapters"):
        exporting.export_adapter(workdir, tmp_path / "out")
