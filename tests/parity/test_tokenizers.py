"""Prompts of published tokenizers become the ids that transformers makes of them, and new ids the same text."""

import json

import pytest

transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from etils import epath
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmjax.data.objectives.prompts import decode_continuation, encode_prompt
from llmjax.interop import tokenizers as published_tokenizers
from tests.interop.test_special_tokens import sentencepiece_model

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "hello world",
    "",
    " hello  world ",
    "hello\nworld\n",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "low</s>lower <s> lowest",
    "na\u00efve \u65e5\u672c <|user|> 12",
]
CHATML = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}


def byte_level(frame: str = "") -> tokenizers.Tokenizer:
    hf_tokenizer = tokenizers.Tokenizer(models.BPE())
    hf_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    hf_tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(hf_tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return framed(hf_tokenizer, frame)


def train(hf_tokenizer, trainer) -> None:
    hf_tokenizer.train_from_iterator(["hello world, hello user", "low lower lowest user assistant"] * 9, trainer)


def framed(hf_tokenizer, frame: str):
    if frame:
        used = [(name, hf_tokenizer.token_to_id(name)) for name in frame.split() if name != "$A"]
        hf_tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)  # type: ignore[assignment]
    return hf_tokenizer


def metaspace(scheme: str, frame: str = "<s> $A") -> tokenizers.Tokenizer:
    hf_tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    hf_tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    train(hf_tokenizer, trainers.BpeTrainer(vocab_size=340, special_tokens=special))
    parts = json.loads(hf_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in SPECIAL]
    return framed(tokenizers.Tokenizer.from_str(json.dumps(parts)), frame)


def prepended() -> tokenizers.Tokenizer:
    """As Llama 2 was published: a normalizer writes the space marks."""
    hf_tokenizer = metaspace("first")
    parts = json.loads(hf_tokenizer.to_str()) | {"pre_tokenizer": None}
    hf_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parts))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    hf_tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    return hf_tokenizer


def word_piece() -> tokenizers.Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    hf_tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    hf_tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    hf_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    hf_tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    train(hf_tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    return framed(hf_tokenizer, "[CLS] $A [SEP]")


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BERT = {"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
JSON = {
    # name: (tokenizer, tokenizer_config.json, model_type)
    "gpt2": (byte_level, {"tokenizer_class": "GPT2Tokenizer", **CHATML}, "gpt2"),
    "qwen2": (byte_level, {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, **CHATML}, "qwen2"),
    "llama3": (lambda: byte_level("<s> $A"), {"tokenizer_class": "PreTrainedTokenizerFast", **CHATML}, "llama"),
    "mistral": (lambda: metaspace("first"), {**LLAMA, "add_bos_token": True, "add_eos_token": False}, "mistral"),
    "metaspace-always": (
        lambda: metaspace("always"),
        {"tokenizer_class": "PreTrainedTokenizerFast", **CHATML},
        "llama",
    ),
    "llama2": (prepended, {**LLAMA, "legacy": False}, "llama"),
    "llama2-silent": (lambda: metaspace("always"), {**LLAMA, "tokenizer_class": "LlamaTokenizerFast"}, "llama"),
    "llama2-legacy": (prepended, {**LLAMA, "legacy": True}, "llama"),
    "llama2-no-prefix": (lambda: metaspace("first"), {**LLAMA, "add_prefix_space": False}, "llama"),
    "mistral-prepended": (prepended, {**LLAMA, "add_bos_token": True, "legacy": False}, "mistral"),
    "llama2-generic": (prepended, {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}, "llama"),
    "bert": (word_piece, BERT, "bert"),
    "bert-bare": (word_piece, {"do_lower_case": True}, "bert"),
}
SPIECE = {"bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": -1, "model_type": "bpe", "remove_extra_whitespaces": False}
SPIECE |= {"byte_fallback": True, "vocab_size": 340, "normalization_rule_name": "identity"}
GEMMA = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
GEMMA |= {"bos_piece": "<bos>", "eos_piece": "<eos>"}
MODELS = {
    # name: (changes to the SentencePiece model, file, tokenizer_config.json, model_type)
    "llama2": (SPIECE, "tokenizer.model", {**LLAMA, "add_bos_token": True, "legacy": False}, "llama"),
    "llama2-silent": (SPIECE, "tokenizer.model", LLAMA, "llama"),
    "gemma": (
        {**SPIECE, **GEMMA},
        "tokenizer.model",
        {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"},
        "gemma",
    ),
    "t5": ({}, "spiece.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 7}, "t5"),
}
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration"}


def compare(folder, config: dict, model_type: str) -> None:
    hf = {"model_type": model_type, "eos_token_id": [2, 4], "vocab_size": 400}
    hf["architectures"] = [ARCHITECTURES.get(model_type, "LlamaForCausalLM")]
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer_file = published_tokenizers.find_tokenizer(epath.Path(folder), hf, num_rows=400)
    settings, tokenizer = tokenizer_file.settings, tokenizer_file.tokenizer
    assert settings.stop_ids == (2, 4)
    different = {}
    for text in TEXTS:
        expected = reference(text)["input_ids"]
        before, after = tokenizer.prompt_frame
        actual = [*before, *encode_prompt(tokenizer, text).tolist(), *after]
        if actual != expected:
            different[text] = (actual, expected)
    assert not different, (type(reference).__name__, different)
    ids = [*tokenizer.prompt_frame[0], *encode_prompt(tokenizer, "hello world, low lower").tolist()]
    for at in range(len(tokenizer.prompt_frame[0]) + 1, len(ids)):
        expected = reference.decode(ids)[len(reference.decode(ids[:at])) :]
        if reference.decode(ids).startswith(reference.decode(ids[:at])):
            assert decode_continuation(tokenizer, ids[:at], ids[at:]) == expected


@pytest.mark.parametrize("name", JSON)
def test_a_tokenizer_json(tmp_path, name):
    make, config, model_type = JSON[name]
    (tmp_path / "tokenizer.json").write_text(make().to_str())
    compare(tmp_path, config, model_type)


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_alone(tmp_path, name):
    changes, file, config, model_type = MODELS[name]
    (tmp_path / file).write_bytes(sentencepiece_model(**changes))
    compare(tmp_path, config, model_type)
