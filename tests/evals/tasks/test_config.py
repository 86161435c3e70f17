"""Bad tasks are refused before anything is read, with one line that names the field and the value."""

import dataclasses

import pytest

from llmjax.errors import UserError
from llmjax.evals.config import KINDS, TaskConfig, check_name, check_tasks
from llmjax.run import config as run_config


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_and_a_path_make_a_task(kind):
    check_tasks({"mine": TaskConfig(kind=kind, path="" if kind == "memorisation" else "a.jsonl")})


def test_every_option_is_used_by_a_kind():
    used = {field for fields in KINDS.values() for field in fields}
    common = {"kind", "path", "format", "columns", "group_field", "limit"}
    assert used | common == {field.name for field in dataclasses.fields(TaskConfig)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "chioce"}, r"eval\.tasks\.mine\.kind='chioce' \(did you mean 'choice'\?\): choose one of choice, "),
        ({"path": ""}, r"eval\.tasks\.mine\.path is not set"),
        ({"good_field": "better"}, r"good_field='better': kind='choice' does not use it; unset it"),
        ({"shots": -1}, r"eval\.tasks\.mine\.shots=-1: must be at least 0"),
        ({"normalize": "chars"}, r"normalize='chars': choose one of raw, bytes, tokens"),
        ({"choices": ("yes",)}, r"choices=\('yes',\): expected two or more different texts"),
        ({"kind": "generate", "stop": ("",)}, r"stop=\('',\): an empty text would end every answer"),
        ({"kind": "classify", "choices": ("a", "b"), "labels": ("0", "1", "2")}, r"one for each of the 2 choices"),
        ({"kind": "memorisation"}, r"path='a\.jsonl': kind='memorisation' does not use it; unset it"),
        ({"kind": "memorisation", "path": "", "canaries": ("a 1", "no digit")}, "canaries: 'no digit' has no digits"),
        ({"kind": "memorisation", "path": "", "prompt_tokens": 0}, "prompt_tokens=0: must be at least 1"),
        (
            {"kind": "generate", "metrics": ("blue",)},
            r"metrics: 'blue' \(did you mean 'bleu'\?\): choose from bleu, chrf",
        ),
        ({"kind": "generate", "metrics": ("cosine",)}, "embedder is not set: cosine needs the workdir of a run"),
        ({"kind": "generate", "embedder": "a"}, "embedder='a': add one of cosine, bertscore to metrics, or unset it"),
        ({"kind": "consistency", "methods": ()}, r"methods=\(\): choose from support, entailment, samples"),
        ({"kind": "consistency", "methods": ("suport",)}, r"methods: 'suport' \(did you mean 'support'\?\)"),
        ({"kind": "consistency", "methods": ("samples",)}, "prompt='': the model writes after it"),
        ({"kind": "consistency", "prompt": "{a}"}, "prompt='{a}': unset it, or set write_text=True"),
        (
            {"kind": "consistency", "labels": ("a", "b", "c")},
            r"labels=.*: expected two texts, that of no and that of yes",
        ),
        ({"kind": "consistency", "temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"kind": "truthful", "separator": ""}, "separator='': give the text between two answers"),
    ],
)
def test_bad_options(options, message):
    task = TaskConfig(**{"kind": "choice", "path": "a.jsonl", **options})
    with pytest.raises(UserError, match=message):
        check_tasks({"mine": task})


@pytest.mark.parametrize("name", ["test", "validation", "a/b", "../a", "a b", ".a", ""])
def test_a_name_that_cannot_name_files(name):
    """One rule for own tasks and for those of lm-eval, whose names may contain dots."""
    with pytest.raises(UserError, match="cannot name files of results"):
        check_tasks({name: TaskConfig(kind="pairs", path="a.jsonl")})
    with pytest.raises(UserError, match=r"task: .* cannot name files of results"):
        check_name(name, "task")
    check_name("piqa-v2.1", "task")


def test_tasks_are_a_section_of_the_config():
    overrides = [("eval.tasks.mine.kind", "choice"), ("eval.tasks.mine.path", "a.csv")]
    overrides.append(("eval.tasks.mine.choices", "('{one}', '{two}')"))
    task = run_config.resolve("quickstart", overrides).eval.tasks["mine"]
    assert (task.choices, task.text_name) == (("{one}", "{two}"), "question")
    with pytest.raises(UserError, match=r"eval\.tasks\.mine\.path is not set"):
        run_config.resolve("quickstart", overrides[:1])
    with pytest.raises(UserError, match=r"unknown config field 'eval.tasks.mine.chioces' \(did you mean 'choices'"):
        run_config.resolve("quickstart", [("eval.tasks.mine.chioces", "()")])
