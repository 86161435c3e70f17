"""Preferences as tokens: text and messages, what is cut, and what is refused by name."""

import json

import numpy as np
import pytest

from llmjax.data.chat_template import ChatTemplate
from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.readers.documents import Document
from llmjax.data.store.preferences import PreferencesFormat
from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.errors import UserError
from tests.data.preparation import BYTES, run_prepare

TOKENIZER = Bytes()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
EOS_NAME = next(name for name, token_id in TOKENIZER.special_tokens.items() if token_id == EOS)
TURNS = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}\n{% endfor %}"
TEMPLATE = ChatTemplate(TURNS + "{% if add_generation_prompt %}a:{% endif %}", {"eos_token": EOS_NAME}, "t.jinja")


def encode(*documents: Document, seq_len: int = 64, template=None):
    form = PreferencesFormat(seq_len=seq_len, template=template)
    encode_texts = lambda texts: TOKENIZER.encode_batch(texts)
    return list(form.encode(documents, encode_texts, TOKENIZER))


def document(prompt, *answers, is_chat=False) -> Document:
    texts = [json.dumps(text) if is_chat else text for text in (prompt, *answers)]
    return Document("a.jsonl:1", texts[0], b"", others=tuple(texts[1:]), is_chat=is_chat)


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_text_has_bos_before_it_and_eos_after_the_answers():
    ids, label, is_cut = encode(document("ab", "c", "def"))[0]
    assert ids.tolist() == [BOS, *b"ab", *b"c", EOS, *b"def", EOS]
    assert label.tolist() == [3, 2, 4] and label.dtype == np.float32 and not is_cut


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ((7, 4, 4), (8, 5, 5)),  # with BOS and EOS
        ((20, 4, 2), (11, 5, 3)),  # the prompt gives way to the longer answer
        ((20, 30, 2), (8, 8, 3)),  # but keeps a quarter of the row
        ((3, 30, 2), (4, 12, 3)),
    ],
)
def test_the_prompt_loses_its_beginning_and_then_answers_their_end(sizes, kept):
    prompt = "".join(chr(97 + n) for n in range(sizes[0]))
    ids, label, is_cut = encode(document(prompt, "y" * sizes[1], "z" * sizes[2]), seq_len=32)[0]
    assert label.tolist() == list(kept) and is_cut == (sum(sizes) + 3 > sum(kept))
    assert TOKENIZER.decode(ids[: kept[0]]).endswith(prompt[-3:]) and len(ids) == sum(kept)


def test_messages_are_written_by_the_template_up_to_the_end_of_the_turn():
    prompt = [message("system", "s"), message("user", f"say {EOS_NAME}")]
    answers = [[message("assistant", "yes")], [message("assistant", "no")]]
    ids, label, _ = encode(document(prompt, *answers, is_chat=True), template=TEMPLATE)[0]
    begin = [*b"s:s", EOS, *b"\nu:say ", *EOS_NAME.encode(), EOS, *b"\na:"]
    assert ids.tolist() == [*begin, *b"yes", EOS, *b"no", EOS]
    assert label.tolist() == [len(begin), 4, 3]


def test_a_template_that_rewrites_the_prompt_is_refused():
    changing = ChatTemplate("{{ messages | length }}" + TURNS, {"eos_token": EOS_NAME}, "t.jinja")
    chat = document([message("user", "q")], [message("assistant", "a")], [message("assistant", "b")], is_chat=True)
    with pytest.raises(UserError, match=r"a.jsonl:1: t.jinja: the chat template does not write the answer after"):
        encode(chat, template=changing)


def test_messages_without_a_template_are_refused():
    with pytest.raises(UserError, match=r"a.jsonl:1: the prompt is a list of messages, and there is no chat template"):
        PreferencesFormat(seq_len=64, template=None).check(document([message("user", "q")], "a", "b", is_chat=True))


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
FIELDS = {"text_field": "prompt", "chosen_field": "chosen", "rejected_field": "rejected", "split": "train"}


def prepare(folder, record, **fields):
    path = folder / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(record) + "\n")
    sources = {"main": SourceConfig(path=str(path), **{**FIELDS, **fields})}
    return run_prepare(DataConfig(sources=sources, tokenizer=BYTES, workers=1, seq_len=16), folder / "store")


CHAT = {"prompt": [message("user", "q")], "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, {}, r"a.jsonl:2: the record has no 'rejected'"),
        (CHAT, {}, r"a.jsonl:2: the prompt is a list of messages, and there is no chat template"),
        ({**CHAT, "chosen": [{"role": "user"}]}, {}, r"a.jsonl:2: the field 'chosen' is no list of messages"),
        ({**GOOD, "chosen": [message("assistant", "a")]}, {}, r"field 'chosen' is not a text"),
        (GOOD, {"rejected_field": ""}, r"set both of chosen_field and rejected_field"),
        (GOOD, {"pair_field": "chosen"}, r"chosen_field='chosen': unset pair_field"),
    ],
)
def test_bad_records_and_settings_are_refused(tmp_path, record, fields, message):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, record, **fields)


def test_rows_too_short_are_refused():
    with pytest.raises(UserError, match=r"data.seq_len=7: has no positions for two answers; set it to 8 or more"):
        PreferencesFormat(seq_len=7, template=None)
