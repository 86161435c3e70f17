"""GGUF files written by the package gguf: tensors, metadata, tokenizers, and what is refused."""

import json

from etils import epath
import gguf
import numpy as np
import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.interop import exporting, importing
from llmjax.run import loading
from tests.interop import gguf_files, published
from tests.interop.gguf_files import LLAMA, TOKENIZER


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    metadata = gguf_files.byte_level(folder=tmp_path_factory.mktemp("tokenizer"))
    return metadata | {f"{TOKENIZER}bos_token_id": 1, f"{TOKENIZER}eos_token_id": 2}


def write_llama(path, tokenizer, tensors=None, kinds=None, **changes):
    tensors = gguf_files.store_llama(published.random_tensors(published.llama_shapes()) if tensors is None else tensors)
    metadata = {**LLAMA, **tokenizer, **{key.replace("__", "."): value for key, value in changes.items()}}
    return gguf_files.write(path, "llama", {k: v for k, v in metadata.items() if v is not None}, tensors, kinds)


def load_back(source, tmp_path, **options):
    """The tensors of the folder that import and export make of a file."""
    workdir = epath.Path(tmp_path / "run")
    imported = importing.import_checkpoint(source, workdir, **options)
    exporting.export(workdir, tmp_path / "out")
    return imported, published.read_tensors(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_and_sizes_of_llama(tmp_path, tokenizer, tied):
    """Queries and keys are stored in another order; the others are stored as they are."""
    tensors = published.random_tensors(published.llama_shapes(tied))
    imported, back = load_back(write_llama(tmp_path / "in.gguf", tokenizer, tensors), tmp_path)
    assert imported.architecture == "LlamaForCausalLM" and imported.types == ["F32"]
    assert set(back) == set(tensors)
    assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: hf.get(name) for name in ("rms_norm_eps", "num_key_value_heads", "tie_word_embeddings")} == {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": published.KV_HEADS,
        "tie_word_embeddings": tied,
    }


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16"])
def test_quantized_tensors(tmp_path, tokenizer, kind):
    """A file of quantized tensors gives the parameters of a file with the dequantized ones."""
    kind = gguf.GGMLQuantizationType[kind]
    name = "blk.1.ffn_up.weight"
    tensors = published.random_tensors(published.llama_shapes())
    imported, back = load_back(write_llama(tmp_path / "in.gguf", tokenizer, tensors, {name: kind}), tmp_path)
    assert imported.types == sorted({"F32", kind.name})
    original = tensors["model.layers.1.mlp.up_proj.weight"]
    expected = gguf.dequantize(gguf.quantize(original, kind), kind).astype(np.float32)
    np.testing.assert_array_equal(back["model.layers.1.mlp.up_proj.weight"], expected)
    assert not np.array_equal(expected, original)


def test_llama3_scaling_is_recognized_by_its_factors(tmp_path, tokenizer):
    """The metadata do not name it: the converter writes a tensor of factors."""
    path = write_llama(tmp_path / "plain.gguf", tokenizer)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    hf = {**published.LLAMA, "rope_parameters": {**rope, "original_max_position_embeddings": 8192}}
    source = published.write_folder(tmp_path / "hf", hf, published.random_tensors(published.llama_shapes()))
    importing.import_checkpoint(source, epath.Path(tmp_path / "first"))
    exporting.export(epath.Path(tmp_path / "first"), tmp_path / "out.gguf", dtype="f32")
    factors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}["rope_freqs.weight"]
    assert factors.shape == (published.HEAD_DIM // 2,) and factors[0] == 1 and factors[-1] > 1
    imported = importing.import_checkpoint(tmp_path / "out.gguf", epath.Path(tmp_path / "second"))
    model = imported.config.model
    assert (model.rope_scaling, model.rope_factor, model.rope_original) == ("llama3", 8.0, 8192)
    tensors = gguf_files.store_llama(published.random_tensors(published.llama_shapes()))
    tensors["rope_freqs.weight"] = np.linspace(1, 3, published.HEAD_DIM // 2, dtype=np.float32)
    gguf_files.write(path, "llama", {**LLAMA, **tokenizer}, tensors)
    with pytest.raises(UserError, match=r"rope_freqs\.weight: not the factors of Llama 3\.1"):
        importing.import_checkpoint(path, epath.Path(tmp_path / "third"))


REFUSED = {
    "architecture": ({}, "mamba", r"general\.architecture='mamba'.* is not supported; supported are llama, qwen3"),
    "unknown metadata": (
        {"llama__new_thing": 3},
        "llama",
        r"the metadata: llama\.new_thing=3 is not a known field .* --ignore=llama\.new_thing",
    ),
    "tokenizer": ({"tokenizer__ggml__model": "rwkv"}, "llama", r"tokenizer\.ggml\.model='rwkv' is not supported"),
    "split rule": ({"tokenizer__ggml__pre": "new-bpe"}, "llama", r"tokenizer\.ggml\.pre='new-bpe' is not supported"),
    "token id": ({"tokenizer__ggml__eos_token_id": 4096}, "llama", r"eos_token_id=4096: there are \d+ tokens"),
    "end of text": ({"tokenizer__ggml__eos_token_id": None}, "llama", r"tokenizer\.ggml\.eos_token_id is missing"),
    "size": ({"llama__block_count": None}, "llama", "the metadata has no num_hidden_layers"),
    "scaling": ({"llama__rope__scaling__type": "longrope"}, "llama", r"rope\.scaling\.type='longrope'"),
    "part": ({"split__count": 3}, "llama", "one of 3 parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_files_are_refused(tmp_path, tokenizer, case):
    changes, arch, message = REFUSED[case]
    path = write_llama(tmp_path / "in.gguf", tokenizer, **changes)
    if arch != "llama":
        gguf_files.write(path, arch, {}, {"x": np.zeros((2, 32), np.float32)})
    with pytest.raises(UserError, match=message) as error:
        importing.import_checkpoint(path, epath.Path(tmp_path / "run"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_unknown_metadata_are_accepted_by_name(tmp_path, tokenizer):
    path = write_llama(tmp_path / "in.gguf", tokenizer, llama__new_thing=3)
    importing.import_checkpoint(path, epath.Path(tmp_path / "run"), ignore=["llama.new_thing"])
    assert json.loads((tmp_path / "run" / "import.json").read_text())["ignored"] == ["llama.new_thing"]


def test_tensors_that_do_not_fit_are_named(tmp_path, tokenizer):
    tensors = published.random_tensors(published.llama_shapes())
    del tensors["model.layers.2.mlp.up_proj.weight"]
    path = write_llama(tmp_path / "in.gguf", tokenizer, tensors)
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        importing.import_checkpoint(path, epath.Path(tmp_path / "run"))
    stored = gguf_files.store_llama(published.random_tensors(published.llama_shapes()))
    stored["blk.0.new.weight"] = np.zeros((2, 32), np.float32)
    gguf_files.write(path, "llama", {**LLAMA, **tokenizer}, stored)
    with pytest.raises(UserError, match=r"blk\.0\.new\.weight of shape \[2, 32\] belongs to no parameter"):
        importing.import_checkpoint(path, epath.Path(tmp_path / "run"))


def test_the_command_reads_a_file_and_suggests_a_chat(tmp_path, tokenizer, capsys):
    template = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    path = write_llama(tmp_path / "model.gguf", {**tokenizer, **template})
    assert main.run(["import", f"--from={path}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "config.json").is_file()
    assert "next: llmjax chat --workdir=" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_damaged_files(tmp_path, tokenizer, damage):
    path = write_llama(tmp_path / "in.gguf", tokenizer)
    content = path.read_bytes()
    path.write_bytes(
        {"text": b"not a GGUF file, but longer than a header", "cut": content[: len(content) // 2], "empty": b""}[
            damage
        ]
    )
    with pytest.raises(UserError, match="not a GGUF file that can be read") as error:
        importing.import_checkpoint(path, epath.Path(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_ids_and_template_come_from_the_metadata(tmp_path, tokenizer):
    """Names say nothing here: <unk> ends texts, </s> ends turns, and <s> pads."""
    ids = {"eos_token_id": 0, "eot_token_id": 2, "padding_token_id": 1, "bos_token_id": 1, "add_bos_token": True}
    metadata = {**tokenizer, **{f"{TOKENIZER}{name}": value for name, value in ids.items()}}
    metadata["tokenizer.chat_template"] = "{{ messages }}"
    workdir = epath.Path(tmp_path / "run")
    importing.import_checkpoint(write_llama(tmp_path / "in.gguf", metadata), workdir)
    with loading.load(workdir) as loaded:
        assert (loaded.tokenizer.stop_ids, loaded.tokenizer.eos_id, loaded.tokenizer.pad_id) == ((0, 2), 0, 1)
        assert loaded.tokenizer.prompt_frame == ((1,), ())
    assert (workdir / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
