"""The tool of fine-tuning recipes: its data holds no copies of test texts, and its table marks what failed."""

import gzip
import json

import pytest

from llmjax.run import config as run_config
from tests import jobs


@pytest.fixture
def tools(monkeypatch):
    """The modules of the tool by name, imported as the script imports them."""
    monkeypatch.syspath_prepend(str(jobs.ROOT / "tools"))
    import finetune_data
    import finetune_pretrain
    import finetune_recipes
    import finetune_tasks

    return {module.__name__: module for module in (finetune_data, finetune_pretrain, finetune_recipes, finetune_tasks)}


def test_copies_of_held_out_texts_are_dropped(tools):
    drop_copies = tools["finetune_data"].drop_copies
    held_out = ["it 's a charming and often affecting journey .", "a gem of a movie , truly"]
    kept = ["a charming journey , often affecting", "no gem here"]
    copies = ["It's a charming -- and often affecting -- journey; see it.", "This is a gem of a movie, truly."]
    assert drop_copies([copies[0], kept[0], copies[1], kept[1]], held_out) == kept


def test_preferences_have_rejected_answers_of_three_kinds(tools, tmp_path):
    (tmp_path / "gpteacher").mkdir()
    (tmp_path / "self-instruct").mkdir()
    records = [
        {
            "instruction": f"Question {n}?",
            "input": "",
            "response": f"First {n}. Second is {'longer ' * (n % 7)}. Third.",
        }
        for n in range(60)
    ]
    (tmp_path / "gpteacher" / "roleplay-instruct.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    (tmp_path / "self-instruct" / "seed_tasks.jsonl.gz").write_bytes(gzip.compress(b""))
    splits = tools["finetune_data"].read_preferences(tmp_path)
    prompts = [record["prompt"][0]["content"] for part in splits.values() for record in part]
    assert len(prompts) == len(set(prompts)) == 60
    answers = {record["response"] for record in records}
    for part in splits.values():
        for number, record in enumerate(part):
            first, second, third = record["chosen"].replace(". ", ".|").split("|")
            assert record["rejected"] != record["chosen"]
            if number % 3 == 0:
                assert record["rejected"] in answers
            else:
                assert record["rejected"] == (f"{third} {second} {first}", f"{first} {first} {third}")[number % 3 - 1]
    lengths = [{"chosen": "abc", "rejected": "ab"}, {"chosen": "ab", "rejected": "cd"}]
    assert tools["finetune_tasks"].prefer_longer(lengths) == 0.75


def test_a_table_marks_failures_and_the_next_tasks_run(tools, capsys):
    recipes, Result = tools["finetune_recipes"], tools["finetune_tasks"].Result
    bound = recipes.EXPECTED_SCORE["sst2"]
    results = {
        "sst2": Result("accuracy", bound + 0.01, {"TF-IDF": 0.8}),
        "stsb": Result("spearman", 0.95, {"TF-IDF": 0.96}),
        "sst2-bert": Result("accuracy", 0.79, {"TF-IDF": 0.8, "majority class": 0.5}),
        "instructions": Result("loss", 0.1, {"before training": 0.2}, ("| a note |",)),
    }

    def run(name):
        if name == "agnews":
            raise SystemExit("llmjax train ended with status 1")
        return results[name], 12.0

    assert recipes.run_tasks(["sst2", "agnews", *list(results)[1:]], run) == ["agnews", "stsb"]
    table = capsys.readouterr().out.rpartition(recipes.HEAD[1])[2].splitlines()[1:]
    assert [("FAILED" in row, row.split("`")[1]) for row in table] == [
        (False, "sst2"),
        (True, "agnews"),
        (True, "stsb"),
        (False, "sst2-bert"),
        (False, "instructions"),
    ]
    assert "ended with status 1" in table[1] and "TF-IDF 0.960" in table[2] and "| 12 s |" in table[3]


def test_a_finished_task_is_not_run_again(tools, tmp_path):
    recipes, Result = tools["finetune_recipes"], tools["finetune_tasks"].Result
    saved = {"result": {"measure": "loss", "score": 1.5, "baselines": {"before training": 2.0}}, "seconds": 3.0}
    (tmp_path / "dpo.json").write_text(json.dumps(saved))
    expected = Result("loss", 1.5, {"before training": 2.0}), 3.0
    assert recipes.run_task("dpo", tmp_path, tmp_path, None, tmp_path) == expected
    with pytest.raises(SystemExit, match=r"docs/testdata.md"):
        recipes.run_task("sst2", tmp_path, tmp_path, None, tmp_path)


def test_every_task_has_an_expected_score_and_every_model_a_config(tools):
    assert set(tools["finetune_recipes"].EXPECTED_SCORE) == set(tools["finetune_recipes"].TASKS)
    for name in tools["finetune_pretrain"].MODELS:
        config = run_config.resolve(f"{jobs.ROOT / 'tools' / 'finetune_pretrain.py'}:{name}", [])
        assert config.data.seq_len == 128 and f"sst2-{name}" in tools["finetune_recipes"].TASKS
