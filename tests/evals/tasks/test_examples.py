"""Examples of JSONL, CSV and TSV files, prompts from templates, and one line for each record that is none."""

import json

import pytest

from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig
from llmjax.evals.tasks.examples import Example, make_prompt, read_examples, write_prompts


def make_task(path, **options) -> TaskConfig:
    return TaskConfig(**{"kind": "classify", "path": str(path), **options})


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.jsonl", '{"text": "one", "label": 1}\n\n{"text": "two, three", "label": 0}\n', {}),
        ("a.csv", 'text,label\none,1\n"two, three",0\n', {}),
        ("a.csv", "label;text\n1;one\n0;two, three\n", {}),
        ("a.tsv", "one\t1\ntwo, three\t0\n", {"columns": ("text", "label")}),
    ],
    ids=["jsonl", "csv", "semicolons", "tsv without header"],
)
def test_formats_give_the_same_examples(tmp_path, name, content, options):
    (tmp_path / name).write_text(content)
    examples = read_examples("mine", make_task(tmp_path / name, **options))
    assert [example.text("text_field", "text") for example in examples] == ["one", "two, three"]
    assert [example.text("label_field", "label") for example in examples] == ["1", "0"]
    assert [example.number("label_field", "label") for example in examples] == [1.0, 0.0]


def test_limit_counts_examples_after_the_shots(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(9)))
    for limit, expected in ((0, 9), (3, 5), (50, 9)):
        assert len(read_examples("mine", make_task(tmp_path / "a.jsonl", shots=2, limit=limit))) == expected
    with pytest.raises(UserError, match=r"eval\.tasks\.mine\.shots=9: the 9 examples of .* leave none to score"):
        read_examples("mine", make_task(tmp_path / "a.jsonl", shots=9))


def test_plain_text_is_for_perplexity_alone(tmp_path):
    (tmp_path / "a.txt").write_text("One text.\nOf two lines.\n")
    (example,) = read_examples("mine", make_task(tmp_path / "*.txt", kind="perplexity"))
    assert example.text("text_field", "text") == "One text.\nOf two lines.\n"
    with pytest.raises(UserError, match=r"path=.*a\.txt is text, which has no fields"):
        read_examples("mine", make_task(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"eval\.tasks\.mine\.path='.*a\.jsonl': has no examples"),
        ("a.csv", "text,label\n", r"eval\.tasks\.mine\.path='.*a\.csv': has no examples"),
        (
            "a.csv",
            "sentence,label\nx,1\n",
            r"eval\.tasks\.mine: .*a\.csv has no column 'text': it has the columns sent",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', r"a\.jsonl:2: not JSON; fix the record"),
        ("a.csv", "text,label\nx,1\ny\n", r"a\.csv, row 2: wrong number of columns"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_examples("mine", make_task(tmp_path / name, format="jsonl" if name == "a.jsonl" else ""))


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(UserError, match=r"eval\.tasks\.mine\.path='.*b\.jsonl': no such file"):
        read_examples("mine", make_task(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match=r"eval\.tasks\.mine\.format='jsonn' \(did you mean 'json"):
        read_examples("mine", make_task(tmp_path / "b.jsonl", format="jsonn"))


def make_example(**fields) -> Example:
    return Example("a.jsonl:3", fields, "eval.tasks.mine")


def test_prompts():
    example = make_example(text="Good.", second="Bad.", Title="A {b}", number=7)
    assert make_prompt(make_task("a"), example) == "Good. "
    assert make_prompt(make_task("a", pair_field="second"), example) == "Good.\nBad. "
    template = '{"x": {number}} {Title}: '  # other braces are text, and so are those of a field's value
    assert make_prompt(make_task("a", prompt=template), example) == '{"x": 7} A {b}: '
    assert make_prompt(make_task("a", prompt="{Title}: {text}\nIs "), example) == "A {b}: Good.\nIs "
    assert write_prompts(["3 "], [("1 ", "one"), ("2 ", "two")], None) == ["1 one\n\n2 two\n\n3 "]


def test_fields_that_are_missing_or_of_another_kind():
    example = make_example(text="Good.", label=None, list=[], item={"a": 1}, half="\ud800", data=b"\xff")
    missing = r"eval\.tasks\.mine\.label_field: a\.jsonl:3 has no 'label'; name one of its fields: text, label, list"
    with pytest.raises(UserError, match=missing):
        example.text("label_field", "label")
    with pytest.raises(UserError, match=r"prompt: a\.jsonl:3 has no 'txt'; .*did you mean 'text'"):
        example.fill("prompt", "{txt}")
    with pytest.raises(UserError, match=r"has an empty list in 'list'"):
        example.texts("answer_field", "list")
    with pytest.raises(UserError, match=r"has \{'a': 1\} in 'item', which is not a text"):
        example.text("text_field", "item")
    for field in ("half", "data"):
        with pytest.raises(UserError, match=f"is not UTF-8 in '{field}'"):
            example.text("text_field", field)
    for value in ("high", True, "nan"):
        with pytest.raises(UserError, match="which is not a number"):
            make_example(label=value).number("label_field", "label")
