"""GGUF files: transformers' reader, which is not ours, gets the same logits from an exported file."""

import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from etils import epath
import gguf
import numpy as np

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.interop import exporting, importing
from llmjax.run import loading
from tests.interop import published
from tests.parity.test_heads import hidden_states
from tests.parity.test_interop import BERT, GPT2, LLAMA, T5, VOCAB, build, logits, random_ids, rows, save

# Heads of 32 numbers: rows of whole blocks of Q8_0.
WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Sizes that transformers does not read from the metadata are the defaults of its classes: head_dim=128 of Qwen3,
# moe_intermediate_size=768 of Qwen3-MoE, n_positions=1024 of GPT-2.
CLASSES = {
    "llama": ("Llama", WIDE),
    "llama-tied": ("Llama", {**WIDE, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen3": ("Qwen3", {**WIDE, "head_dim": 128}),
    "qwen3moe": ("Qwen3Moe", {**WIDE, **EXPERTS, "head_dim": 32}),
    "gemma2": ("Gemma2", {**WIDE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {**WIDE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gpt2": ("GPT2", {**GPT2, "n_embd": 64, "n_positions": 1024}),
}
# Those that transformers does not read, or not as llama.cpp does: our own reader gets the same tensors.
OURS = {
    "mixtral": ("Mixtral", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}, "LlamaForCausalLM"),
    "olmo2": ("Olmo2", WIDE, "Olmo2ForCausalLM"),
    "llama3": ("Llama", {**WIDE, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **ROPE}}, ""),
}


def export(name: str, kind: str, settings: dict, tmp_path, dtype: str):
    """(model of transformers, its GGUF file, workdir)"""
    auto = transformers.AutoModelForSeq2SeqLM if kind == "T5" else transformers.AutoModelForCausalLM
    model, workdir = build(kind, auto, settings), epath.Path(tmp_path / "run")
    importing.import_checkpoint(save(model, tmp_path / "in"), workdir)
    path = tmp_path / "exports" / "out.gguf"
    exported = exporting.export(workdir, path, dtype=dtype)
    assert exported.files == ["out.gguf"] and exported.architecture == f"general.architecture={name}"
    return model, path, workdir


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_the_same_logits(name, tmp_path):
    kind, settings = CLASSES[name]
    model, path, _ = export(name.partition("-")[0], kind, settings, tmp_path, "f32")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor(random_ids((2, 20)), dtype=torch.long)
    if name.startswith("gemma"):  # the metadata do not have it, and transformers takes the default of its class
        for layer in back.model.layers:
            layer.self_attn.scaling = 16**-0.5
    with torch.no_grad():
        expected, actual = model(ids).logits, back(ids).logits
    # Norms of Gemma are stored with 1 added: their last bits are lost.
    torch.testing.assert_close(actual, expected, atol=1e-4 if name.startswith("gemma") else 1e-6, rtol=0)


@pytest.mark.parametrize("name", [*CLASSES, *OURS, "t5", "t5encoder"])
def test_the_file_is_imported_again(name, tmp_path):
    """The identity but for Gemma's norms."""
    table = {**CLASSES, **OURS, "t5": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})}
    table["t5encoder"] = table["t5"]
    kind, settings, *_ = table[name]
    arch = {"mixtral": "llama", "llama3": "llama"}.get(name, name.partition("-")[0])
    if name == "t5encoder":
        config = transformers.T5Config(vocab_size=VOCAB, **settings)
        source = save(transformers.T5EncoderModel(config), tmp_path / "in")
        importing.import_checkpoint(source, epath.Path(tmp_path / "run"))
        path = tmp_path / "out.gguf"
        exporting.export(epath.Path(tmp_path / "run"), path, dtype="f32")
    else:
        _, path, _ = export(arch, kind, settings, tmp_path, "f32")
    importing.import_checkpoint(path, epath.Path(tmp_path / "again"))
    for workdir, folder in (("run", "first"), ("again", "second")):
        exporting.export(epath.Path(tmp_path / workdir), tmp_path / folder)
    first, second = (published.read_tensors(tmp_path / folder) for folder in ("first", "second"))
    assert set(first) == set(second)
    for tensor_name, tensor in first.items():
        if name.startswith("gemma") and "norm" in tensor_name:
            np.testing.assert_allclose(second[tensor_name], tensor, atol=1e-6)
        else:
            assert published.same_bits(second[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_types_of_tensors(dtype, tmp_path):
    """Matrices have the type, norms stay float32, and what is read is what the package quantizes."""
    _, path, workdir = export("llama", *CLASSES["llama"], tmp_path, dtype)
    exporting.export(workdir, tmp_path / "f32.gguf", dtype="f32")
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = gguf.GGMLQuantizationType[dtype.upper() if len(tensor.shape) > 1 else "F32"]
        assert tensor.tensor_type == kind, tensor.name
        stored = gguf.quantize(expected[tensor.name].data, kind)
        assert tensor.data.tobytes() == stored.tobytes(), tensor.name
    importing.import_checkpoint(path, epath.Path(tmp_path / "again"))
    ids = random_ids((2, 20))
    with loading.load(epath.Path(tmp_path / "again")) as loaded:
        rounded = logits(loaded, rows(ids))
    with loading.load(workdir) as loaded:
        exact = logits(loaded, rows(ids))
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_bert_embeds(tmp_path):
    config = transformers.BertConfig(vocab_size=VOCAB, **BERT)
    torch.manual_seed(0)
    model, ids = transformers.BertModel(config).eval(), random_ids((2, 16))
    source = save(model, tmp_path / "in", special=("[PAD]", "[CLS]", "[SEP]"))
    importing.import_checkpoint(source, epath.Path(tmp_path / "run"))
    exporting.export(epath.Path(tmp_path / "run"), tmp_path / "out.gguf", dtype="f32")
    importing.import_checkpoint(tmp_path / "out.gguf", epath.Path(tmp_path / "again"))
    with torch.no_grad():
        expected = model(torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()
    with loading.load(epath.Path(tmp_path / "again")) as loaded:
        np.testing.assert_allclose(hidden_states(loaded, ids), expected, atol=1e-5)


REFUSED = {
    "local layers": (
        "Mistral",
        {**WIDE, "sliding_window": 8},
        r"general\.architecture=llama: it cannot express model\.window=8",
    ),
    "scale": ("Gemma2", {**WIDE, "head_dim": 16, "query_pre_attn_scalar": 40}, r"cannot express model\.score_scale="),
    "class": ("DeepseekV3", None, "DeepseekV3ForCausalLM is not supported; supported are LlamaForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_llama_cpp_lacks_are_refused(case, tmp_path):
    from tests.parity.test_interop import CAUSAL

    kind, settings, message = REFUSED[case]
    settings = settings or CAUSAL["deepseek_v3"][1]
    model, workdir = build(kind, transformers.AutoModelForCausalLM, settings), epath.Path(tmp_path / "run")
    importing.import_checkpoint(save(model, tmp_path / "in"), workdir)
    with pytest.raises(UserError, match=message):
        exporting.export(workdir, tmp_path / "out.gguf", dtype="f32")
    assert not list(tmp_path.glob("out.gguf*"))


def test_the_command(tmp_path):
    """Types and names that do not fit the format are refused before anything is loaded."""
    arguments = ["export", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"--dtype=bfloat16: with --format=gguf, choose one of f32, f16, q8_0"):
        main.run([*arguments, f"--to={tmp_path / 'out.gguf'}", "--format=gguf", "--dtype=bfloat16"])
    with pytest.raises(UserError, match=r"with --format=gguf, give a file whose name ends in \.gguf"):
        main.run([*arguments, f"--to={tmp_path / 'out'}", "--format=gguf"])
