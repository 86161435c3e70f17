"""Special tokens of published folders: where a text ends, what is put around a prompt, tokens that other files add."""

import io
import json

from etils import epath
import numpy as np
import pytest

from llmjax.cli import main
from llmjax.data.objectives.prompts import decode_continuation, encode_prompt
from llmjax.data.store.tokenizer import read_tokenizer
from llmjax.errors import UserError
from llmjax.interop import exporting, importing, special_tokens, tokenizers
from llmjax.run import loading
from tests.interop import published

WORDS = ["<unk>", "<s>", "</s>", "<|eot|>", "\u2581hello", "\u2581world", "\u2581user", ",", "\u2581", "hello", "world"]
UNK, BOS, EOS, EOT, HELLO, WORLD, USER, COMMA, SPACE, BARE_HELLO, BARE_WORLD = range(11)


def make_tokenizer(scheme: str = "always", frame: str = "", special=("<unk>", "<s>", "</s>", "<|eot|>")):
    """Unigram pieces after space marks. frame: "" for no post-processor, else a template such as "<s> $A"."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in WORDS], unk_id=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    if frame:
        used = [(name, WORDS.index(name)) for name in frame.split() if name != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)  # type: ignore[assignment]
    return tokenizer


def write(folder, tokenizer=None, **files):
    """A folder with a tokenizer and the JSON files NAME=CONTENT."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text((tokenizer or make_tokenizer()).to_str())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder, hf=None, num_rows=None):
    hf = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else hf or {}
    content = (folder / "tokenizer.json").read_bytes()
    settings = special_tokens.read(epath.Path(folder), "huggingface", content, hf, num_rows=num_rows)
    return settings, read_tokenizer("huggingface", content, settings=settings)


def write_chain(folder, follows: dict[int, int], tokenizer, **files):
    """A Llama whose next token depends on the last one alone: follows[last], or last itself."""
    vocab = files.pop("vocab", len(WORDS))
    embed = np.eye(vocab, 16, dtype=np.float32)
    shapes = {name: shape for name, shape in _chain_shapes(vocab).items() if name.startswith("model.layers.0.")}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tensors |= {"model.embed_tokens.weight": embed, "model.norm.weight": np.ones(16, np.float32)}
    tensors["lm_head.weight"] = np.zeros_like(embed)
    for last in range(vocab):
        tensors["lm_head.weight"][follows.get(last, last)] += embed[last]
    sizes = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    hf = {**published.LLAMA, **sizes, **heads, **files.pop("config", {})}
    for name in [name for name, value in hf.items() if value is None]:
        del hf[name]
    write(folder, tokenizer, config=hf, **files)
    published.write_tensors(folder, tensors)
    return folder


def _chain_shapes(vocab: int) -> dict[str, tuple[int, ...]]:
    attention = {f"self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
    mlp = {"mlp.gate_proj.weight": (8, 16), "mlp.up_proj.weight": (8, 16), "mlp.down_proj.weight": (16, 8)}
    norms = {"input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,)}
    return {f"model.layers.0.{name}": shape for name, shape in {**attention, **mlp, **norms}.items()}


def generate(workdir, prompt: str, capsys) -> str:
    capsys.readouterr()
    flags = ["--temperature=0", "--max_tokens=12"]
    assert main.run(["generate", f"--workdir={workdir}", f"--prompt={prompt}", *flags]) == 0
    return capsys.readouterr().out.removesuffix("\n")


ENDS = {
    # files beside the tokenizer: (stop_ids, eos_id)
    "generation_config": (
        {"generation_config": {"eos_token_id": [3, 2]}, "config": {"eos_token_id": 1}},
        ((3, 2), 3),
    ),
    "named_among_them": (
        {"generation_config": {"eos_token_id": [2, 3]}, "tokenizer_config": {"eos_token": "<|eot|>"}},
        ((2, 3), 3),
    ),
    "named_elsewhere": (
        {"generation_config": {"eos_token_id": 3}, "tokenizer_config": {"eos_token": "</s>"}},
        ((3,), 3),
    ),
    "generation_config_without": (
        {"generation_config": {"do_sample": True}, "config": {"eos_token_id": [2, 3]}},
        ((2, 3), 2),
    ),
    "empty_list": ({"generation_config": {"eos_token_id": []}, "config": {"eos_token_id": 3}}, ((3,), 3)),
    "text_config": ({"config": {"text_config": {"eos_token_id": [3]}}}, ((3,), 3)),
    "tokenizer_config": ({"config": {}, "tokenizer_config": {"eos_token": {"content": "<|eot|>"}}}, ((3,), 3)),
    "special_tokens_map": ({"special_tokens_map": {"eos_token": "<|eot|>"}}, ((3,), 3)),
    "sep_token": ({"tokenizer_config": {"sep_token": "<|eot|>", "cls_token": "<s>"}}, ((3,), 3)),
}


@pytest.mark.parametrize("case", ENDS)
def test_eos_is_read_from_the_files(tmp_path, case):
    files, expected = ENDS[case]
    settings, tokenizer = read(write(tmp_path, **files))
    assert (settings.stop_ids, settings.eos_id) == expected
    assert (tokenizer.stop_ids, tokenizer.eos_id) == expected


def test_an_end_of_text_that_the_model_or_the_tokenizer_lacks_is_passed_over(tmp_path):
    """Documents end with an id that has a row and a token; generation may stop at a row without a token."""
    files = {"generation_config": {"eos_token_id": 99}, "config": {"eos_token_id": [15, 99, 3]}}
    settings, tokenizer = read(write(tmp_path, **files), num_rows=16)
    assert (settings.stop_ids, settings.eos_id) == ((15, 3), 3) == (tokenizer.stop_ids, tokenizer.eos_id)
    with pytest.raises(UserError, match=r"names the token that ends a text; set eos_token_id .* below 11"):
        read(write(tmp_path, config={"eos_token_id": 15}), num_rows=16)


def test_eos_is_read_from_the_template_if_no_file_names_it(tmp_path):
    settings, _ = read(write(tmp_path, make_tokenizer(frame="<s> $A <|eot|>")))
    assert settings.stop_ids == (EOT,) and (settings.prefix, settings.suffix) == ((BOS,), (EOT,))


def test_eos_is_found_by_its_usual_name_if_no_file_names_it(tmp_path):
    settings, _ = read(write(tmp_path, config={}))
    assert (settings.stop_ids, settings.eos_id) == ((EOS,), EOS)
    with pytest.raises(UserError, match=r"no file names the token that ends a text; set eos_token_id in config\.json"):
        read(write(tmp_path, make_tokenizer(special=("<unk>", "<|eot|>")), config={}))


BAD = {
    "a name": ({"config": {"eos_token_id": "</s>"}}, r"config\.json: eos_token_id='</s>': expected a token id"),
    "a list of names": (
        {"generation_config": {"eos_token_id": ["</s>"]}},
        r"generation_config\.json: eos_token_id=\['</s>'\]",
    ),
    "a number for a token": ({"tokenizer_config": {"eos_token": 3}}, r"eos_token=3: expected a token's text"),
    "a list": ({"tokenizer_config": []}, r"tokenizer_config\.json: not a JSON object"),
    "an added token's id": (
        {"config": {"eos_token_id": 2}, "added_tokens": {"<x>": "12"}},
        r"added_tokens\.json: expected an id",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_values_of_a_wrong_kind_are_one_line(tmp_path, case):
    files, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path, **files))
    assert "\n" not in str(error.value)


FRAMES = {
    # (post-processor, tokenizer_config.json): (before, after)
    "neither": ("", {}, ((), ())),
    "template": ("<s> $A", {}, ((BOS,), ())),
    "both sides": ("<s> $A </s>", {}, ((BOS,), (EOS,))),
    "switched on": ("", {"add_bos_token": True}, ((BOS,), ())),
    "switched off": ("<s> $A", {"add_bos_token": False}, ((), ())),
    "EOS alone": ("<s> $A", {"add_eos_token": True}, ((), (EOS,))),
    "no BOS named": ("", {"add_bos_token": True, "bos_token": None}, ((), ())),
}


@pytest.mark.parametrize("case", FRAMES)
def test_ids_around_a_prompt(tmp_path, case):
    frame, config, expected = FRAMES[case]
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    settings, tokenizer = read(write(tmp_path, make_tokenizer(frame=frame), tokenizer_config=config))
    assert tokenizer.prompt_frame == (settings.prefix, settings.suffix) == expected
    assert tokenizer.bos_id == (BOS if expected[0] else None)


@pytest.mark.parametrize(("scheme", "expected"), [("first", BARE_WORLD), ("always", WORLD)])
def test_text_after_a_special_token_follows_the_prepend_scheme(tmp_path, scheme, expected):
    _, tokenizer = read(write(tmp_path, make_tokenizer(scheme), config={"eos_token_id": EOS}))
    assert encode_prompt(tokenizer, "hello<|eot|>world").tolist() == [HELLO, EOT, expected]
    assert tokenizer.encode_batch(["<s>"])[0].tolist() != [BOS]  # documents never hold special tokens


def test_a_continuation_keeps_its_first_space(tmp_path):
    _, tokenizer = read(write(tmp_path, config={"eos_token_id": EOS}))
    assert decode_continuation(tokenizer, [HELLO], [WORLD, COMMA, USER]) == " world, user"
    assert decode_continuation(tokenizer, [BOS, HELLO], [BARE_WORLD]) == "world"
    assert decode_continuation(tokenizer, [], [WORLD]) == "world"


def test_generation_stops_at_every_stop_id_and_all_are_exported(tmp_path, capsys):
    files = {"config": {"eos_token_id": [EOS, EOT], "bos_token_id": None}, "tokenizer_config": {"eos_token": "<|eot|>"}}
    source = write_chain(
        tmp_path / "in", {HELLO: WORLD, WORLD: EOT, USER: COMMA, COMMA: EOS}, make_tokenizer(), **files
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    workdir = epath.Path(tmp_path / "run")
    importing.import_checkpoint(source, workdir)
    assert generate(workdir, "hello", capsys) == "hello world"
    assert generate(workdir, "user", capsys) == "user,"
    exporting.export(workdir, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [EOS, EOT]
    assert "bos_token_id" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_an_id_without_a_row_is_never_produced_from_text(tmp_path):
    tokenizer = make_tokenizer(special=("<s>", "</s>", "<pad>"))
    pad = tokenizer.token_to_id("<pad>")
    folder = write(tmp_path, tokenizer, config={"eos_token_id": EOS}, tokenizer_config={"pad_token": "<pad>"})
    settings, tokenizer = read(folder, num_rows=pad)
    assert tokenizer.vocab_size == pad and "<pad>" not in tokenizer.special_tokens and settings.pad_id is None
    assert max(encode_prompt(tokenizer, "hello<pad>world").tolist()) < pad
    with pytest.raises(UserError, match=r"only 9 rows .*9, 'hello'.*: they do not belong together"):
        read(folder, num_rows=9)


def test_tokens_of_other_files_are_read(tmp_path):
    config = {"added_tokens_decoder": {"11": {"content": "<a>", "special": True}}, "eos_token": "</s>"}
    folder = write(tmp_path, tokenizer_config=config | {"pad_token": "<new>"}, added_tokens={"<b>": 12})
    settings, tokenizer = read(folder)
    assert encode_prompt(tokenizer, "hello<a><b><new>").tolist() == [HELLO, 11, 12, 13]
    assert settings.pad_id == 13 and tokenizer.vocab_size == 14
    assert tokenizer.decode([HELLO, 12]) == "hello<b>"
    write(tmp_path, added_tokens={"<b>": 20})
    with pytest.raises(UserError, match="'<b>' cannot have the id 20"):
        read(folder)


def sentencepiece_model(**changes) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    settings = {"model_type": "unigram", "vocab_size": 40, "hard_vocab_limit": False, **ids, **changes}
    texts = iter(["hello world", "hello user, hello world", "the world of words", "low, lower, lowest"] * 5)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, minloglevel=2, num_threads=1, **settings
    )
    return model.getvalue()


def read_spiece(tmp_path, content: bytes, config: dict, hf: dict):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    settings = special_tokens.read(epath.Path(tmp_path), "sentencepiece", content, hf, num_rows=None)
    return settings, read_tokenizer("sentencepiece", content, settings=settings)


@pytest.mark.parametrize("config", [{"extra_ids": 5}, {"tokenizer_class": "T5Tokenizer", "extra_ids": 5}])
def test_sentinels_of_a_lone_spiece_model_descend(tmp_path, config):
    content = sentencepiece_model()
    settings, tokenizer = read_spiece(tmp_path, content, {"eos_token": "</s>", **config}, {"model_type": "t5"})
    size = read_tokenizer("sentencepiece", content).vocab_size
    assert [tokenizer.special_tokens[f"<extra_id_{i}>"] for i in range(5)] == [size + 4 - i for i in range(5)]
    assert tokenizer.vocab_size == size + 5 and tokenizer.prompt_frame == ((), (1,)) and settings.stop_ids == (1,)
    hello, world = (tokenizer.encode_batch([text])[0].tolist() for text in ("hello", "world"))
    assert encode_prompt(tokenizer, "hello <extra_id_0> world").tolist() == [*hello, size + 4, *world]
    assert tokenizer.decode([*hello, size + 4, *world]).startswith("hello<extra_id_0>")


def test_sentencepiece_with_a_dummy_prefix(tmp_path):
    """As Llama 1 and 2: the tokenizer adds a space before a text, and none after special tokens."""
    settings = {"bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": -1, "remove_extra_whitespaces": False}
    content = sentencepiece_model(model_type="bpe", **settings)
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    _, tokenizer = read_spiece(tmp_path, content, config, {"model_type": "llama"})
    assert tokenizer.prompt_frame == ((1,), ())
    ids = encode_prompt(tokenizer, "hello")
    assert tokenizer.piece(int(ids[0])).startswith(b" ")
    assert not tokenizer.piece(int(encode_prompt(tokenizer, "hello</s>hello")[len(ids) + 1])).startswith(b" ")
    space_world = encode_prompt(tokenizer, "a world")[len(encode_prompt(tokenizer, "a")) :]
    assert decode_continuation(tokenizer, ids, space_world) == " world"


CASES = {"stop-ids": "hello world", "space-mark-always": "hello world, user"}


@pytest.mark.parametrize("case", CASES)
def test_shared_cases_continue_as_in_transformers(shared_data, tmp_path, capsys, case):
    source, workdir = shared_data / "cases" / case, epath.Path(tmp_path / "run")
    importing.import_checkpoint(source, workdir)
    assert generate(workdir, "hello", capsys) == CASES[case]
    exporting.export(workdir, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").exists() == (case == "stop-ids")


@pytest.mark.parametrize(("case", "expected"), [("no-bos", [257, 310, 324]), ("with-bos", [325, 257, 310, 324])])
def test_cases_with_and_without_bos(shared_data, case, expected):
    folder = shared_data / "cases" / case
    _, tokenizer = read(folder, num_rows=327)
    before, after = tokenizer.prompt_frame
    assert [*before, *encode_prompt(tokenizer, "hello world").tolist(), *after] == expected


def test_shared_case_of_one_id_more(shared_data, tmp_path):
    importing.import_checkpoint(shared_data / "cases" / "one-id-more", epath.Path(tmp_path / "run"))
    with loading.load(epath.Path(tmp_path / "run")) as loaded:
        tokenizer = loaded.tokenizer
    assert tokenizer.vocab_size == 327
    assert all(max(encode_prompt(tokenizer, f"hello {name} world")) < 327 for name in ("<pad>", "[PAD]", "<s>"))


def test_case_of_t5_without_tokenizer_json(shared_data):
    folder = epath.Path(shared_data / "cases" / "t5-spiece-alone")
    content, hf = (folder / "spiece.model").read_bytes(), json.loads((folder / "config.json").read_text())
    settings = special_tokens.read(folder, "sentencepiece", content, hf, num_rows=160)
    tokenizer = read_tokenizer("sentencepiece", content, settings=settings)
    assert (tokenizer.special_tokens["<extra_id_0>"], tokenizer.special_tokens["<extra_id_99>"]) == (152, 53)
    assert encode_prompt(tokenizer, "hello <extra_id_0> world").tolist() == [20, 152, 52]


@pytest.mark.parametrize(("frame", "begin"), [("", BOS), ("", EOS), ("<s> $A </s>", BOS), ("<s> $A", None)])
def test_exported_tokenizer_adds_the_first_token_of_training_documents(tmp_path, frame, begin):
    """And nothing else, whatever the tokenizer that the run was given did."""
    from tokenizers import Tokenizer

    content = make_tokenizer(frame=frame).to_str().encode()
    tokenizer = read_tokenizer("huggingface", content)
    tokenizers.write(tokenizer, content, epath.Path(tmp_path), bos_id=begin)
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode("hello").ids == [*([] if begin is None else [begin]), HELLO]


def test_single_file_precedes_an_index_and_tied_head_may_be_absent(tmp_path):
    tensors = {"a": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float32)}
    published.write_tensors(tmp_path, tensors, limit=16)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = listed["weight_map"]["a"]
    index.write_text(json.dumps(listed))
    assert set(published.read_tensors(tmp_path)) == {"a", "b"}
    published.write_tensors(tmp_path, {"c": np.ones(2, np.float32)})
    assert set(published.read_tensors(tmp_path)) == {"c"}
