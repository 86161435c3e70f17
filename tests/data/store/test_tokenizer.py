"""Tokenizers: trained ones are lossless, others keep special tokens out of documents, errors name the fix."""

import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from llmjax.data.objectives import vocabulary
from llmjax.data.objectives.prompts import encode_prompt
from llmjax.data.store import tokenizer
from llmjax.data.store.tokenizer import read_tokenizer
from llmjax.data.store.tokenizer_training import train_sentencepiece
from llmjax.errors import UserError

CODE = "def f(x):\n    if x:\n\treturn {'a': [1, 22, 333]}  # two\r\n\r\n\n\n"
HARD = [
    CODE,
    CODE * 300,
    "a\u2581b \u2581\u2581 \u2585",
    "\0 nul \x01\x1f\x7f",
    "\t\ttabs\t \t",
    "crlf\r\ncr\rlf\n",
    " ",
    "   ",
    "\n",
    " leading and trailing ",
    "😀 👩‍👩‍👧 é e\u0301 ﬁ \uff21 ½ \u00a0\u3000\ufeff\u200b",
    "吾輩は猫である。" * 800,
    "<s> </s> <unk> <pad> <0x41> <|endoftext|>",
    "x" * 10_000,
    "\U0010ffff\ue000\ufffd",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    rng = random.Random(0)
    syllables = ["al", "pha", "be", "ta", "gam", "ma", "del", "ep", "si", "lon", "ze", "io", "kap", "lam", "bda"]
    lines = [" ".join("".join(rng.choices(syllables, k=rng.randrange(1, 4))) for _ in range(20)) for _ in range(60)]
    texts = [CODE, "\n".join([*lines, "alpha " * 50])]
    return read_tokenizer("sentencepiece", train_sentencepiece(texts, algorithm=request.param, vocab_size=360))


def test_trained_tokenizers_round_trip_every_text(trained):
    encoded = trained.encode_batch(HARD)
    assert [trained.decode(ids) for ids in encoded] == HARD
    assert all(ids.dtype == np.int32 and ids.min() >= 4 and ids.max() < trained.vocab_size for ids in encoded)
    # A batch is its texts one by one.
    assert all((trained.encode_batch([text])[0] == ids).all() for text, ids in zip(HARD, encoded, strict=True))


def test_trained_tokenizers_learn_the_text(trained):
    assert len(trained.encode_batch(["alpha" * 10])[0]) < 25
    assert trained.vocab_size == 360
    assert (trained.pad_id, trained.unk_id, trained.bos_id, trained.eos_id) == (0, 1, 2, 3)
    assert trained.special_tokens == {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3}


def test_pieces_concatenate_to_the_text(trained):
    for text in HARD:
        ids = trained.encode_batch([text])[0]
        assert b"".join(trained.piece(int(i)) for i in ids) == text.encode()
    assert trained.piece(trained.eos_id) == b"</s>"


def test_pieces_of_byte_level_and_wordpiece_vocabularies():
    byte_level = huggingface(
        tokenizers.models.BPE(
            {"\u0120": 0, "a": 1, "\u00c3": 2, "\u00a9": 3, "\u010a": 4, "\u0120a": 5, "</s>": 6}, [("\u0120", "a")]
        ),
        tokenizers.decoders.ByteLevel(),
    )
    assert [byte_level.piece(i) for i in range(7)] == [b" ", b"a", b"\xc3", b"\xa9", b"\n", b" a", b"</s>"]
    assert byte_level.joiner == ""
    wordpiece = huggingface(
        tokenizers.models.WordPiece({"un": 0, "##able": 1, "?": 2, "</s>": 3}, unk_token="?"),
        tokenizers.decoders.WordPiece(),
    )
    assert [wordpiece.piece(i) for i in range(4)] == [b"un", b"##able", b"?", b"</s>"]
    continues_word, can_be_continued = vocabulary.find_word_edges(wordpiece)
    assert continues_word.tolist() == [False, True, False, False] and can_be_continued.tolist() == [
        True,
        True,
        True,
        False,
    ]


def huggingface(model, decoder) -> tokenizer.Tokenizer:
    tok = tokenizers.Tokenizer(model)
    tok.decoder = decoder
    tok.add_special_tokens(["</s>"])
    return read_tokenizer("huggingface", tok.to_str().encode())


def test_training_is_deterministic():
    texts = [CODE * 20, "some words here " * 50]
    models = {train_sentencepiece(texts, algorithm="bpe", vocab_size=300) for _ in range(3)}
    assert len(models) == 1


def test_bytes():
    tok = read_tokenizer("bytes", b"")
    assert [tok.decode(ids) for ids in tok.encode_batch(HARD)] == HARD
    assert tok.decode([104, 105, tok.eos_id, 255]) == "hi\ufffd"


def test_huggingface_keeps_special_tokens_out_of_text(tmp_path):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|startoftext|>", "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([CODE], trainer)
    tok = read_tokenizer("huggingface", model.to_str().encode())
    assert (tok.eos_id, tok.bos_id, tok.pad_id, tok.unk_id) == (0, 1, 2, None)
    encoded = tok.encode_batch(HARD)
    assert [tok.decode(ids) for ids in encoded] == HARD and min(ids.min() for ids in encoded) > 2
    assert tok.vocab_size == model.get_vocab_size()


def test_tokenizer_json_without_eos_is_refused():
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="no end-of-text token"):
        read_tokenizer("huggingface", model.to_str().encode())


def test_published_models(shared_data):
    model = gzip.decompress((shared_data / "gpt-neox-tokenizer/tokenizer.json.gz").read_bytes())
    tok = read_tokenizer("huggingface", model)
    assert tok.special_tokens[("<|endoftext|>")] == tok.eos_id
    assert tok.decode(tok.encode_batch([CODE])[0]) == CODE
    lossy = read_tokenizer("sentencepiece", (shared_data / "sentencepiece/test_model.model").read_bytes())
    assert lossy.decode(lossy.encode_batch(["two  spaces"])[0]) != "two  spaces"


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_damaged_model_is_named(kind, content):
    with pytest.raises(UserError, match=f"data.tokenizer.path: not a {kind} model"):
        read_tokenizer(kind, content)


def test_error_for_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'sentencepiece'"):
        read_tokenizer("sentencpiece", b"")


def test_special_tokens_in_a_prompt_are_recognised():
    tok = read_tokenizer("bytes", b"")
    assert encode_prompt(tok, "<s>a</s><pad>b").tolist() == [256, 97, 257, 258, 98]
    assert encode_prompt(tok, "").tolist() == []
    assert tok.encode_batch(["<s>"])[0].tolist() == list(b"<s>"), "a document's text is text"
    with pytest.raises(UserError, match="not UTF-8"):
        encode_prompt(tok, "\udcff")


def test_unknown_special_tokens_in_a_prompt():
    tok = read_tokenizer("bytes", b"")
    for text in ("plain", "<s>known</s>", "a < b | c > d", "x[MASK] <div> List<T>"):
        tok.check_special(text)
    for text in ("<|user|> hi", "hi <eos>"):
        with pytest.raises(
            UserError, match=r"not a special token of this tokenizer.*its special tokens: <s>, </s>, <pad>"
        ):
            tok.check_special(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"algorithm": "word", "vocab_size": 400}, "algorithm='word'"),
        ({"algorithm": "bpe", "vocab_size": 100}, "vocab_size=100: give 300 or more"),
        ({"algorithm": "bpe", "vocab_size": 9000}, "vocab_size=9000: cannot be trained on this text"),
    ],
)
def test_training_with_invalid_settings(fields, message):
    with pytest.raises(UserError, match=message):
        train_sentencepiece([CODE], **fields)


def test_a_store_names_its_tokenizer(tmp_path):
    with pytest.raises(UserError, match="run `llmjax prepare`"):
        tokenizer.load_tokenizer(tmp_path)
    model = train_sentencepiece([CODE * 20], algorithm="bpe", vocab_size=300)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tok = read_tokenizer("sentencepiece", model)
    record = {"kind": "sentencepiece", "sha256": tok.sha256, "lossless": False}
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": record}))
    loaded = tokenizer.load_tokenizer(tmp_path)
    assert loaded.sha256 == tok.sha256 and not loaded.lossless
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece([CODE * 20], algorithm="bpe", vocab_size=301))
    with pytest.raises(UserError, match="not the one that the store was prepared with"):
        tokenizer.load_tokenizer(tmp_path)


def test_preparation_imports_no_device_code():
    code = "import sys, llmjax.data.store.stages, llmjax.data.store.workers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
