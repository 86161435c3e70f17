"""Tokenizers of each kind, from the metadata of a GGUF file and back: the same ids as the original library gives."""

import json

from etils import epath
import numpy as np
import pytest
import tokenizers as library

from llmjax.errors import UserError
from llmjax.interop import gguf_tokenizers, tokenizers
from tests.interop import gguf_files, published
from tests.interop.gguf_files import TOKENIZER

TEXTS = [
    "def main(argv):\n    return 1234  # x",
    "It's\t\tA  naïve café, isn't it? ",
    "  日本語 \n\n 12 345",
    "<user>x <s>",
]
IDS = {f"{TOKENIZER}bos_token_id": 1, f"{TOKENIZER}eos_token_id": 2}


def read(metadata, folder):
    """The tokenizer that the files written from the metadata give."""
    folder.mkdir(exist_ok=True)
    hf = gguf_tokenizers.write_files(metadata, folder)
    size = len(metadata[f"{TOKENIZER}tokens"])
    return tokenizers.find_tokenizer(epath.Path(folder), hf, num_rows=size).tokenizer


def assert_returns(metadata, tokenizer, folder):
    """What was written gives the metadata again."""
    ids = {"eos_token_id": list(tokenizer.stop_ids), "bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    size = len(metadata[f"{TOKENIZER}tokens"])
    back = gguf_tokenizers.read_files(folder, ids, tokenizer.prompt_frame, size)
    for name in ("model", "tokens", "merges", "scores", "eos_token_id"):
        if f"{TOKENIZER}{name}" in metadata:
            assert back[f"{TOKENIZER}{name}"] == metadata[f"{TOKENIZER}{name}"], name
    assert back[f"{TOKENIZER}add_bos_token"] is bool(tokenizer.prompt_frame[0])
    (folder / "again").mkdir()
    gguf_tokenizers.write_files(back, folder / "again")
    again = tokenizers.find_tokenizer(
        epath.Path(folder / "again"), {"eos_token_id": ids["eos_token_id"]}, num_rows=size
    )
    for text in TEXTS:
        np.testing.assert_array_equal(again.tokenizer.encode_prompt(text), tokenizer.encode_prompt(text))


# tokenizer.ggml.pre -> what a rule makes of "It's 1234\n\n x": the differences between the rules
SPLITS = {
    "gpt-2": ["It", "'s", "Ġ1234", "ĊĊ", "Ġx"],
    "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġx"],
    "llama-bpe": ["It", "'s", "Ġ", "123", "4", "ĊĊ", "Ġx"],
    "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġx"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level(tmp_path, pre):
    """The split rule follows `pre`; merges and ids are those of the library."""
    metadata = gguf_files.byte_level(pre=pre, folder=tmp_path) | IDS
    tokenizer = read(metadata, tmp_path / "files")
    parts = json.loads((tmp_path / "files" / "tokenizer.json").read_text())
    rule = library.Tokenizer.from_str(json.dumps(parts)).pre_tokenizer
    words = [word for word, _ in rule.pre_tokenize_str("It's 1234\n\n x")]
    assert "".join(words) == "It'sĠ1234ĊĊĠx" and words == SPLITS[pre]
    assert tokenizer.prompt_frame == (((1,), ()) if pre == "llama-bpe" else ((), ()))
    if pre == "gpt-2":
        original = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in TEXTS:
            assert tokenizer.encode_prompt(text).tolist() == original.encode(text, add_special_tokens=False).ids
    assert_returns(metadata, tokenizer, tmp_path / "files")
    assert gguf_tokenizers.read_files(tmp_path / "files", {"eos_token_id": 2}, ((), ()), 300)[f"{TOKENIZER}pre"] == pre


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_sentencepiece(tmp_path, kind):
    import sentencepiece

    content, metadata = gguf_files.sentencepiece(kind)
    tokenizer = read(metadata, tmp_path / "files")
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in TEXTS[:3]:
        assert tokenizer.encode_prompt(text).tolist() == original.encode(text)
    # llama.cpp's defaults: BOS before a text of `llama`, EOS after one of `t5`
    assert tokenizer.prompt_frame == (((1,), ()) if kind == "llama" else ((), (2,)))
    assert tokenizer.encode_prompt("a<s>b").tolist() == [*original.encode("a"), 1, *original.encode("b")]
    assert tokenizer.encode_prompt("<user>").tolist()[-1] == original.piece_to_id("<user>")
    assert_returns(metadata, tokenizer, tmp_path / "files")


def test_sentencepiece_without_a_space_before_a_text(tmp_path):
    _, metadata = gguf_files.sentencepiece("llama")
    with_space = read(metadata, tmp_path / "with")
    without = read({**metadata, f"{TOKENIZER}add_space_prefix": False}, tmp_path / "without")
    assert without.piece(without.encode_prompt("argument")[0])[:1] == b"a"
    assert with_space.piece(with_space.encode_prompt("argument")[0])[:1] == b" "


@pytest.mark.parametrize("is_cased", [False, True])
def test_bert(tmp_path, is_cased):
    """The metadata mark where words begin, WordPiece where they go on."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "return", "arg", "##ument", "##s", "def", "(", ")", "cafe"]
    pieces += ["Paris"] if is_cased else ["paris"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    original = library.Tokenizer(library.models.WordPiece(vocab, unk_token="[UNK]"))
    original.normalizer = library.normalizers.BertNormalizer(lowercase=not is_cased)
    original.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokens = [p if p[0] == "[" else p[2:] if p.startswith("##") else f"\u2581{p}" for p in pieces]
    ids = {"bos": 2, "eos": 3, "unknown": 1, "padding": 0, "mask": 4, "seperator": 3, "cls": 2}
    metadata = {f"{TOKENIZER}model": "bert", f"{TOKENIZER}tokens": tokens}
    metadata |= {f"{TOKENIZER}token_type": [3] * 5 + [1] * (len(pieces) - 5)}
    metadata |= {f"{TOKENIZER}{name}_token_id": number for name, number in ids.items()}
    tokenizer = read(metadata, tmp_path / "files")
    for text in ("def arguments(Paris) café", "return paris"):
        assert tokenizer.encode_prompt(text).tolist() == original.encode(text).ids
    assert tokenizer.prompt_frame == ((2,), (3,)) and tokenizer.stop_ids == (3,) and tokenizer.pad_id == 0
    if is_cased:
        with pytest.raises(UserError, match="lowercases"):
            assert_returns(metadata, tokenizer, tmp_path / "files")
    else:
        assert_returns(metadata, tokenizer, tmp_path / "files")


def test_a_split_rule_that_llama_cpp_lacks_is_refused(tmp_path):
    published.write_tokenizer(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, parts["pre_tokenizer"]],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match="none of those known"):
        gguf_tokenizers.read_files(tmp_path, {"eos_token_id": 2}, ((), ()), 300)
