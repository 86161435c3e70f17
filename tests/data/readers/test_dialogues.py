"""Dialogues in every format that people have become the same messages; records that are none are named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmjax.data.config import SourceConfig
from llmjax.data.readers import documents as readers, sources
from llmjax.data.readers.dialogues import DialogueError, read_dialogue
from llmjax.errors import UserError

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"function": {"name": "add", "arguments": "{}"}, "type": "function"}


@pytest.mark.parametrize(
    ("record", "name", "messages"),
    [
        ({"messages": [SYSTEM, QUESTION, ANSWER], "prompt": "x"}, "messages", [SYSTEM, QUESTION, ANSWER]),
        ({"conversations": [QUESTION, ANSWER]}, "messages", [QUESTION, ANSWER]),
        ({"messages": json.dumps([QUESTION, ANSWER])}, "messages", [QUESTION, ANSWER]),
        (
            {"messages": [{**QUESTION, "content": [{"type": "text", "text": "Why"}, {"text": "?"}]}, ANSWER]},
            "messages",
            [QUESTION, ANSWER],
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."}]},
            "sharegpt",
            [{"role": "system", "content": "s"}, QUESTION, {**ANSWER, "content": "No."}],
        ),
        (
            {"conversation": [{"from": "gpt", "value": "Because.", "weight": 0}, {"from": "observation", "value": "3"},
                              {"from": "gpt", "value": "Because."}]},
            "sharegpt",
            [{**ANSWER, "weight": 0}, {"role": "tool", "content": "3"}, ANSWER],
        ),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "alpaca", [QUESTION, ANSWER]),
        (
            {"instruction": "Add.", "input": "1 2", "response": "3"},
            "alpaca",
            [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"prompt": "Why?", "completion": "Because."}, "prompt", [QUESTION, ANSWER]),
        ({"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]}, "prompt", [SYSTEM, QUESTION, ANSWER]),
    ],
)  # fmt: skip
def test_every_format_becomes_messages(record, name, messages):
    for chat in ("auto", name):
        dialogue = read_dialogue(record, chat)
        assert (dialogue.format, dialogue.messages, dialogue.tools) == (name, messages, None)


def test_turns_of_tools_are_passed_through():
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answered = {"role": "tool", "content": "3", "tool_call_id": "a", "name": None}
    tools = [{"type": "function", "function": {"name": "add"}}]
    dialogue = read_dialogue({"messages": [QUESTION, called, answered, ANSWER], "tools": json.dumps(tools)}, "auto")
    assert dialogue.messages[1] == {**called, "content": ""}
    assert dialogue.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "a"}
    assert dialogue.tools == tools and "add" in dialogue.text and dialogue.text.startswith("Why?\n\n")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a", "id": 3}, "no field messages, conversations, instruction or prompt (its fields: text, id)"),
        ({"instruction": "a"}, "no field 'output' or 'response'"),
        ({"prompt": "a", "completion": 3}, "field 'completion' is not a text"),
        ({"messages": "Hello"}, "field 'messages' is not a list"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [QUESTION]}, "no assistant turn"),
        ({"messages": [QUESTION, {**ANSWER, "content": " \n"}]}, "an empty assistant turn"),
        ({"prompt": "Why?", "completion": ""}, "an empty assistant turn"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "all assistant turns have weight 0"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 2}]}, "the weight of a turn is 2, not 0 or 1"),
        ({"messages": [{"content": "a"}]}, "a message has no role"),
        ({"messages": [{**QUESTION, "content": [{"type": "image_url"}]}, ANSWER]}, "content of type 'image_url'"),
        ({"messages": [{**QUESTION, "content": "\ud800"}, ANSWER]}, "lone surrogate"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "a turn is from 'narrator', not from human"),
    ],
)
def test_other_records_are_named(record, reason):
    with pytest.raises(DialogueError) as error:
        read_dialogue(record, "auto")
    assert reason in str(error.value)


def read(path, **fields):
    units = sources.list_units("main", SourceConfig(path=str(path), **fields))
    return [record for unit in units for record in readers.read_unit(unit)]


def test_files_of_every_format_hold_dialogues(tmp_path):
    records = [{"instruction": "Why?", "input": "", "output": f"Because {number}."} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.csv").write_text("instruction,output\n" + "".join(f"Why?,Because {n}.\n" for n in range(3)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    turns = [{"messages": [QUESTION, {"role": "assistant", "content": f"Because {n}."}]} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(turns), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        documents = read(path, chat="auto")
        assert [document.dialogue.messages[-1]["content"] for document in documents] == [
            f"Because {number}." for number in range(3)
        ], path
        assert documents[0].text == "Why?\n\nBecause 0." and documents[0].data == documents[0].text.encode()


def test_text_field_names_another_field_of_the_turns(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"dialog": [QUESTION, ANSWER], "messages": []}) + "\n{}\n")
    document, reject = read(tmp_path / "a.jsonl", chat="auto", text_field="dialog")
    assert document.dialogue.messages == [QUESTION, ANSWER]
    assert reject.id.endswith("a.jsonl:2") and reject.reason == "no field 'dialog'"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("a.jsonl", {"chat": "sharegtp"}, r"chat='sharegtp' \(did you mean 'sharegpt'\?\): expected one of auto"),
        ("a.jsonl", {"chat": "auto", "label_field": "l"}, "dialogues have no labels"),
        ("a.txt", {"chat": "auto"}, "a.txt is text, which has no turns"),
    ],
)
def test_sources_that_cannot_hold_dialogues_are_refused(tmp_path, name, fields, message):
    (tmp_path / name).write_text('{"prompt": "a"}\n' if name.endswith("jsonl") else "Hello\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, **fields)
