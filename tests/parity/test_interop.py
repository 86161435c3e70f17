"""Folders that transformers saves are imported, and what is exported transformers loads: same tensors, logits, text."""

import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from etils import epath
from flax import nnx
import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.cli import main
from llmjax.data.store.tokenizer_training import train_sentencepiece
from llmjax.inference import generate
from llmjax.interop import exporting, importing, tokenizers
from llmjax.run import loading
from tests import jobs
from tests.interop import published

VOCAB = published.VOCAB
PROMPT = "def main(argv):\n    return"
DECODER = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, **DECODER}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **DECODER}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
FULL = "full_attention"
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
CAUSAL = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", {**LLAMA, "num_key_value_heads": 2}),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "mixtral": ("Mixtral", {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4}),
    "gpt_oss": ("GptOss", {**LLAMA, **EXPERTS, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    "deepseek_v3": ("DeepseekV3", {**LLAMA, **LATENT, "n_routed_experts": 16, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    "gemma2-whole": ("Gemma2", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "layer_types": [FULL] * 3}),
}


def build(kind: str, model_class: type, settings: dict):
    """A small random model, moved off its start, in eval mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, attn_implementation="eager", **settings)
    model = model_class.from_config(config)
    if kind == "T5" and not settings.get("tie_word_embeddings", True):
        # transformers ties what it builds, and unties what it reads
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, settings["d_model"]) / 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def save(model, folder, special=("<unk>", "<s>", "</s>"), **options):
    model.save_pretrained(folder, **options)
    published.write_tokenizer(folder, special)
    return folder


def same_state(model, other) -> None:
    state, back = model.state_dict(), other.state_dict()
    assert set(state) == set(back)
    for name, tensor in state.items():
        assert torch.equal(tensor.view(torch.int32), back[name].view(torch.int32)), name


def rows(ids: np.ndarray, **more) -> Batch:
    """A batch of full rows, one document each."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).astype(np.int32)
    ones = np.ones(ids.shape, np.int32)
    sample = np.zeros((len(ids), 2), np.uint32)
    weights = ones.astype(np.float32)
    return Batch(inputs=ids, targets=ids, weights=weights, segments=ones, positions=positions, sample=sample, **more)


def logits(loaded, batch: Batch) -> np.ndarray:
    def run(params, batch):
        model = nnx.merge(loaded.graph, params)
        return model.unembed(model(batch).hidden)

    return np.asarray(jax.jit(run)(loaded.params, batch))[..., :VOCAB]


def complete(loaded, prompt: str, max_tokens: int = 12) -> str:
    return generate.complete(loaded, [prompt], generate.Sampling(max_tokens=max_tokens, temperature=0))[0]


def random_ids(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, shape).astype(np.int32)


def their_text(folder, model, ids: list[int], max_tokens: int = 12) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, attention_mask=None
    )[0].tolist()
    new = out[1:] if model.config.is_encoder_decoder else out[len(ids) :]
    end = new.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in new else len(new)
    return tokenizer.decode(new[:end], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name, tmp_path):
    kind, settings = CAUSAL[name]
    model = build(kind, transformers.AutoModelForCausalLM, settings)
    source, workdir = save(model, tmp_path / "in", max_shard_size="20KB"), epath.Path(tmp_path / "run")
    imported = importing.import_checkpoint(source, workdir)
    exporting.export(workdir, tmp_path / "out", max_shard_bytes=30_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(back).__name__ == type(model).__name__ == imported.architecture
    same_state(model, back)

    ids = random_ids((8, 20))
    with torch.no_grad():
        expected = back(torch.tensor(ids, dtype=torch.long)).logits.numpy()
        first = model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(expected, first, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer(PROMPT)["input_ids"]  # without BOS: this tokenizer puts none
    with loading.load(workdir) as loaded:
        np.testing.assert_allclose(logits(loaded, rows(ids)), expected, atol=2e-4, rtol=0)
        assert complete(loaded, PROMPT) == their_text(tmp_path / "out", back, prompt)


@pytest.mark.parametrize("kind", ["Bert", "ModernBert"])
def test_masked(kind, tmp_path):
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    more = {} if kind == "Bert" else {"num_hidden_layers": 4, "pad_token_id": 0, "local_attention": 8}
    model = build(kind, transformers.AutoModelForMaskedLM, {**BERT, "max_position_embeddings": 64, **more})
    source, workdir = save(model, tmp_path / "in", special), epath.Path(tmp_path / "run")
    importing.import_checkpoint(source, workdir)
    exporting.export(workdir, tmp_path / "out")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    same_state(model, back)
    ids = random_ids((8, 24))
    with torch.no_grad():
        expected = back(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    with loading.load(workdir) as loaded:
        np.testing.assert_allclose(logits(loaded, rows(ids)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_sequence_to_sequence(kind, tmp_path, capsys):
    more = {} if kind == "v1.0" else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model = build("T5", transformers.AutoModelForSeq2SeqLM, {**T5, **more})
    special = ("<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(30)))
    source, workdir = save(model, tmp_path / "in", special), epath.Path(tmp_path / "run")
    importing.import_checkpoint(source, workdir)
    exporting.export(workdir, tmp_path / "out")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    same_state(model, back)
    ids, source_ids = random_ids((8, 12)), random_ids((8, 20))
    with torch.no_grad():
        expected = back(torch.tensor(source_ids).long(), decoder_input_ids=torch.tensor(ids).long()).logits.numpy()
    read = rows(source_ids)
    batch = rows(ids, source=source_ids, source_segments=read.segments, source_positions=read.positions)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    eos_id, sentinel_id = (tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<extra_id_0>"))
    plain, trained = (their_text(tmp_path / "out", back, [*text, last]) for last in (eos_id, sentinel_id))
    assert plain != trained, "the form must matter"
    with loading.load(workdir) as loaded:
        np.testing.assert_allclose(logits(loaded, batch), expected, atol=5e-4, rtol=0)
        assert complete(loaded, PROMPT) == plain
    command = ["generate", f"--workdir={workdir}", f"--prompt={PROMPT}", "--temperature=0", "--max_tokens=12"]
    for flags, expected in (([], plain), (["--prompt_form=trained"], PROMPT + trained)):
        capsys.readouterr()
        main.run([*command, *flags])
        assert expected + "\n" in capsys.readouterr().out


def test_trained_tokenizer_is_read_by_other_libraries(tmp_path):
    """SentencePiece BPE becomes a tokenizer.json with the same ids, long texts and all."""
    texts = [path.read_text() for path in sorted((jobs.ROOT / "llmjax").rglob("*.py"))]
    content = train_sentencepiece(texts[:20], algorithm="bpe", vocab_size=600)
    tokenizer = tokenizers.read_tokenizer("sentencepiece", content)
    summary = tokenizers.write(tokenizer, content, epath.Path(tmp_path), texts=texts)
    assert "the same ids" in summary
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (expected.bos_token_id, expected.eos_token_id, expected.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        imported = expected(text, add_special_tokens=False, split_special_tokens=True)
        assert imported["input_ids"] == ids.tolist()
        assert expected.decode(ids.tolist(), clean_up_tokenization_spaces=False) == text
