"""`llmjax import` and `llmjax export` on folders written here: together the identity, bit by bit, on any mesh."""

import json

from etils import epath
import numpy as np
import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.interop import exporting, importing
from llmjax.run import loading
from tests import jobs
from tests.interop import published

MESHES = {
    "one axis": [],
    "fsdp 4 x tensor 2": [("mesh.data", "1"), ("mesh.fsdp", "4"), ("mesh.tensor", "2")],
    "unrolled": [("model.scan", "false")],
}


def round_trip(source, tmp_path, overrides=(), **options):
    workdir = epath.Path(tmp_path / "run")
    imported = importing.import_checkpoint(source, workdir, overrides=list(overrides))
    exported = exporting.export(workdir, tmp_path / "out", **options)
    return imported, exported, published.read_tensors(tmp_path / "out")


@pytest.mark.parametrize("mesh", MESHES)
def test_llama_round_trips_bitwise(tmp_path, mesh):
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors, limit=20_000)
    assert len(list(source.glob("model-*.safetensors"))) > 3
    imported, exported, back = round_trip(source, tmp_path, MESHES[mesh], max_shard_bytes=30_000)
    assert len(exported.files) > 3 and (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert imported.parameters == sum(tensor.size for tensor in tensors.values())
    assert set(back) == set(tensors)
    assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_bfloat16_round_trips_bitwise(tmp_path):
    tensors = published.random_tensors(published.llama_shapes(), "BF16")
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors)
    _, _, back = round_trip(source, tmp_path, dtype="bfloat16")
    assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())


def test_gpt2_as_first_published(tmp_path):
    tensors = published.random_tensors(published.gpt2_shapes())
    source = published.write_folder(tmp_path / "in", published.GPT2, tensors)
    _, exported, back = round_trip(source, tmp_path)
    assert exported.architecture == "GPT2LMHeadModel"
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".attn.bias")}
    assert set(back) == {f"transformer.{name}" for name in kept}
    assert all(published.same_bits(back[f"transformer.{name}"], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("copied", [False, True])
def test_tied_heads(tmp_path, copied):
    tensors = published.random_tensors(published.llama_shapes(tied=True))
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if copied else {}
    hf = {**published.LLAMA, "tie_word_embeddings": True}
    source = published.write_folder(tmp_path / "in", hf, tensors | head)
    _, _, back = round_trip(source, tmp_path)
    assert set(back) == set(tensors)  # as transformers saves it: once
    assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_head_that_differs_is_refused(tmp_path):
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", {**published.LLAMA, "tie_word_embeddings": True}, tensors)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        round_trip(source, tmp_path)


def _without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


BAD = {
    "missing": (
        lambda t: _without(t, "model.layers.1.mlp.up_proj.weight"),
        r"model\.layers\.1\.mlp\.up_proj\.weight is missing; expected shape \[48, 32\]",
    ),
    "extra": (
        lambda t: t | {"model.extra": np.ones((2, 3), np.float32)},
        r"model\.extra of shape .* belongs to no",
    ),
    "shape": (
        lambda t: t | {"model.norm.weight": np.ones(33, np.float32)},
        r"model\.norm\.weight has shape \[33\]; expected \[32\]",
    ),
    "type": (lambda t: t | {"model.norm.weight": np.ones(32, np.int32)}, r"model\.norm\.weight is stored as I32"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_fit_are_named(tmp_path, case):
    change, message = BAD[case]
    tensors = change(published.random_tensors(published.llama_shapes()))
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors)
    with pytest.raises(UserError, match=message):
        importing.import_checkpoint(source, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


BAD_CONFIG = {
    "architecture": ({"architectures": ["LlamaForCausalLn"]}, r"LlamaForCausalLn \(did you mean 'LlamaForCausalLM'"),
    "field": ({"mlp_bias": True}, r"mlp_bias=True is not supported"),
    "unknown field": ({"wild_new_thing": 3}, r"wild_new_thing=3 is not a known field"),
    "quantised": ({"quantization_config": {"quant_method": "gguf"}}, r"quant_method='gguf' is not supported"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_unsupported_configs_are_refused(tmp_path, case):
    change, message = BAD_CONFIG[case]
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", {**published.LLAMA, **change}, tensors)
    with pytest.raises(UserError, match=message):
        importing.import_checkpoint(source, epath.Path(tmp_path / "run"))


MALFORMED = {
    "num_attention_heads=0": ("Llama", {"num_attention_heads": 0}),
    "hidden_size='48'": ("Llama", {"hidden_size": "48"}),
    "vocab_size=True": ("Llama", {"vocab_size": True}),
    "rms_norm_eps='x'": ("Llama", {"rms_norm_eps": "x"}),
    "rope_theta='x'": ("Llama", {"rope_theta": "x"}),
    "max_position_embeddings=None": ("Llama", {"max_position_embeddings": None}),
    "hidden_act=['silu']": ("Llama", {"hidden_act": ["silu"]}),
    "tie_word_embeddings='no'": ("Llama", {"tie_word_embeddings": "no"}),
    "num_key_value_heads='2'": ("Llama", {"num_key_value_heads": "2"}),
    "model.num_kv_heads=3": ("Llama", {"num_key_value_heads": 3}),
    "num_hidden_layers=2.5": ("Qwen3", {"num_hidden_layers": 2.5}),
    "rope_scaling='linear'": ("Llama", {"rope_scaling": "linear"}),
    "has no rope_scaling.factor": ("Llama", {"rope_scaling": {"rope_type": "yarn"}}),
    "rope_parameters.factor='4'": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}),
    "rope_parameters.full_attention=3": ("Olmo3", {"rope_parameters": {"full_attention": 3}}),
    "rope_parameters=[]": ("Gemma3", {"rope_parameters": []}),
    "query_pre_attn_scalar=0": ("Gemma2", {"query_pre_attn_scalar": 0}),
    "query_pre_attn_scalar=None": ("Gemma2", {"query_pre_attn_scalar": None}),
    "query_pre_attn_scalar=-4": ("Gemma2", {"query_pre_attn_scalar": -4}),
    "sliding_window='4'": ("Gemma2", {"sliding_window": "4"}),
    "sliding_window_pattern='x'": ("Gemma3", {"sliding_window_pattern": "x"}),
    "layer_types=3": ("Gemma2", {"layer_types": 3}),
    "layer_types holds ['x']": ("Gemma2", {"layer_types": [["x"]]}),
    "n_embd='8'": ("GPT2LMHeadModel", {"n_embd": "8"}),
    "mlp_only_layers=3": ("Qwen3Moe", {"mlp_only_layers": 3}),
    "num_experts='8'": ("Qwen3Moe", {"num_experts": "8"}),
    "routed_scaling_factor=None": ("DeepseekV3", {"routed_scaling_factor": None}),
    "rope_scaling='yarn'": ("GptOss", {"rope_scaling": "yarn"}),
    "text_config='x'": ("Gemma3ForConditionalGeneration", {"text_config": "x"}),
    "has no text_config": ("Gemma3ForConditionalGeneration", {}),
    "layer_types has 2 entries for 3 layers": ("ModernBertForMaskedLM", {"layer_types": ["full_attention"] * 2}),
    "layer_types holds 'chunked_attention'": ("ModernBertForMaskedLM", {"layer_types": ["chunked_attention"] * 3}),
    "global_attn_every_n_layers=0": ("ModernBertForMaskedLM", {"global_attn_every_n_layers": 0}),
    "local_attention='x'": ("ModernBertForMaskedLM", {"local_attention": "x"}),
    "rope_parameters.full_attention='x'": ("ModernBertForMaskedLM", {"rope_parameters": {"full_attention": "x"}}),
    "has no num_attention_heads": ("BertForMaskedLM", {"num_attention_heads": None}),
    "feed_forward_proj=3": ("T5ForConditionalGeneration", {"feed_forward_proj": 3}),
    "d_kv='x'": ("T5ForConditionalGeneration", {"d_kv": "x"}),
    "architectures='LlamaForCausalLM'": ("Llama", {"architectures": "LlamaForCausalLM"}),
    "architectures=[3]": ("Llama", {"architectures": [3]}),
    "quantization_config='fp8'": ("Llama", {"quantization_config": "fp8"}),
    "quant_method=['fp8']": ("Llama", {"quantization_config": {"quant_method": ["fp8"]}}),
    "weight_block_size=[0, 2]": (
        "DeepseekV3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 2]}},
    ),
}
T5_SIZES = {"num_layers": 3, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48}


@pytest.mark.parametrize("words", MALFORMED)
def test_values_of_a_wrong_kind_are_one_line(tmp_path, words):
    name, change = MALFORMED[words]
    name = name if "For" in name or name.startswith("GPT2") else f"{name}ForCausalLM"
    base = {"GPT2": published.GPT2, "T5Fo": {"vocab_size": 300, **T5_SIZES}}.get(name[:4])
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    base = base or {size: published.LLAMA[size] for size in sizes}
    hf = {**base, "architectures": [name], **change}
    source = published.write_folder(tmp_path / "in", hf, published.random_tensors({"x": (1,)}))
    with pytest.raises(UserError) as error:
        importing.import_checkpoint(source, epath.Path(tmp_path / "run"))
    message = str(error.value)
    assert "\n" not in message and "config.json" in message and words in message


def test_a_shard_that_is_missing_is_named(tmp_path):
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors, limit=20_000)
    gone = sorted(source.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        importing.import_checkpoint(source, epath.Path(tmp_path / "run"))


def test_a_file_that_is_cut_short_is_named(tmp_path):
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="the file ends before tensor"):
        importing.import_checkpoint(source, epath.Path(tmp_path / "run"))


def test_the_padding_of_the_vocabulary_is_zero(tmp_path):
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors)
    importing.import_checkpoint(source, epath.Path(tmp_path / "run"))
    with loading.load(epath.Path(tmp_path / "run")) as loaded:
        params = loaded.params
    table, head = np.asarray(params["embed"]["table"]), np.asarray(params["head"])
    assert table.shape == (384, 32) and head.shape == (32, 384)
    assert not table[300:].any() and not head[:, 300:].any()
    np.testing.assert_array_equal(head[:, :300].T, tensors["lm_head.weight"])


def test_from_import_to_training_to_export(tmp_path, capsys):
    """Import, training and export by the commands that a user types."""
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors)
    run, corpus = str(tmp_path / "run"), jobs.write_corpus(tmp_path / "corpus")
    assert main.run(["import", f"--from={source}", f"--workdir={run}"]) == 0
    assert "next: llmjax generate" in capsys.readouterr().out
    with pytest.raises(UserError, match="already contains a run"):
        main.run(["import", f"--from={source}", f"--workdir={run}"])
    generate = ["generate", f"--workdir={run}", "--prompt=def main(", "--max_tokens=5", "--temperature=0"]
    assert main.run(generate) == 0
    err = capsys.readouterr().err
    assert "step 0 (imported parameters), greedy" in err
    assert "next: llmjax train" in err  # eval would need a token store
    with pytest.raises(UserError, match=r"no token store there; run `llmjax prepare .*data\.sources\.main\.path="):
        main.run(["eval", f"--workdir={run}"])
    keep = ("data.seq_len", "data.workers", "train.global_batch", "train.loss_chunk", "optimizer.warmup_steps")
    settings = {name: jobs.TINY[name] for name in keep} | {
        "train.steps": 2,
        "data.sources.main.path": f"{corpus}/*.txt",
    }
    train = ["train", f"--workdir={run}", *(f"--config.{name}={value}" for name, value in settings.items())]
    assert main.run(train) == 0
    out = capsys.readouterr().out
    assert "starting from the parameters that were imported" in out and "training from step 0 to 2" in out
    assert main.run(train) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert main.run(["eval", f"--workdir={run}"]) == 0
    to = str(tmp_path / "out")
    assert main.run(["export", f"--workdir={run}", f"--to={to}", "--dtype=bfloat16"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: in\n" in card and "AutoModelForCausalLM" in card and "- Device-hours: " in card
    assert not (tmp_path / "out.partial").exists()
    back = published.read_tensors(tmp_path / "out")
    assert set(back) == set(tensors) and {tensor.dtype for tensor in back.values()} == {published.BFLOAT16}
    moved = np.abs(back["model.norm.weight"].astype(np.float32) - tensors["model.norm.weight"]).max()
    assert 0 < moved < 0.1
    with pytest.raises(UserError, match="already exists"):
        main.run(["export", f"--workdir={run}", f"--to={to}"])
    # the card of the workdir replaces an unedited one, and an edited one is exported
    assert main.run(["card", f"--workdir={run}"]) == main.run(["card", f"--workdir={run}"]) == 0
    (tmp_path / "run" / "README.md").write_text("# My card\n")
    with pytest.raises(UserError, match="was not written by `llmjax card`, or was edited"):
        main.run(["card", f"--workdir={run}"])
    assert main.run(["export", f"--workdir={run}", f"--to={tmp_path / 'mine'}"]) == 0
    assert (tmp_path / "mine" / "README.md").read_text() == "# My card\n"
    assert f"model card: {run}/README.md, which you wrote" in capsys.readouterr().out
    # a config file brings everything but model and tokenizer
    config = [f"--config={jobs.ROOT / 'configs' / 'quickstart.py'}", "--config.train.steps=3"]
    assert main.run([*train, *config]) == 0
    assert "training from step 2 to 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_trained_run_is_exported(tmp_path, kind):
    """With its tokenizer where others have a class for it, and with the average that is evaluated."""
    run, corpus = tmp_path / "run", jobs.write_corpus(tmp_path / "corpus", 12)
    changes = {
        "data.tokenizer.kind": kind,
        "data.tokenizer.vocab_size": 600,
        "train.steps": 2,
        "optimizer.ema_decay": 0.5,
    }
    settings = {
        **jobs.TINY,
        **changes,
        "data.seq_len": 128,
        "model.max_positions": 64,
        "data.sources.main.path": f"{corpus}/*.txt",
    }
    config = f"--config={jobs.ROOT / 'configs' / 'quickstart.py'}"
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    assert main.run(["train", config, f"--workdir={run}", *overrides]) == 0
    exported = exporting.export(epath.Path(run), tmp_path / "out")
    assert exported.parameters == "EMA of the parameters"
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["max_position_embeddings"] == 128
    if kind == "bytes":
        assert exported.tokenizer.startswith("no tokenizer") and not (tmp_path / "out" / "tokenizer.json").exists()
        return
    assert "the same ids" in exported.tokenizer and hf["eos_token_id"] == 3
    with loading.load(epath.Path(run)) as loaded:
        params = loaded.params
    scale = published.read_tensors(tmp_path / "out")["model.norm.weight"]
    np.testing.assert_array_equal(scale, params["norm"]["scale"])
