"""`llmjax compare` on workdirs in the real format: the page, the summary, and one line for each bad input."""

import json

from etils import epath
import pytest

from llmjax.cli.compare import compare as command
from llmjax.errors import UserError
from llmjax.report import comparison
from tests.report.runs import HOSTILE, PageParser, answer_lines, check_svgs, make_run, put, put_task, scores


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with another learning rate, batch and field; both have the task "mine", one has "other"."""
    folder = tmp_path_factory.mktemp("compared")
    for name, rate, batch in (("small", 0.1, 8), ("large", 0.2, 16)):
        run = make_run(folder / "parts" / name, steps=1000 if name == "small" else 500).rename(folder / name)
        config = json.loads((run / "config.json").read_text())
        config["train"]["global_batch"] = batch
        config["optimizer"] = {"learning_rate": rate} | ({"extra": HOSTILE, "empty": ""} if name == "small" else {})
        put(run / "config.json", config)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [{**line, "total_targets": line["total_targets"] * batch // 8} for line in lines]
        put(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    put_task(folder / "small", 500, "mine", "acc", answer_lines("000"))
    put_task(folder / "small", 1000, "mine", "acc", answer_lines("0000000011"))
    put_task(folder / "large", 750, "mine", "acc", answer_lines("1111111111"))
    put_task(folder / "small", 1000, "other", "acc", answer_lines("01"))
    return folder


@pytest.fixture(scope="module")
def page(runs) -> str:
    output = runs / "page.html"
    assert command([str(runs / "small"), str(runs / "large"), f"--output={output}"]) == 0
    return output.read_text()


def test_the_page_has_every_part_and_loads_nothing(page):
    parsed = PageParser(page)
    for title in ("Scores", "Paired tests", "Wins and losses", "Cost beside quality", "Curves", "Config"):
        assert f"<h2>{title}</h2>" in page
    assert not {"script", "link", "img"} & set(parsed.tags)
    assert not [value for name, value in parsed.attributes if name in ("src", "href")]
    # Training loss over steps and over tokens, three scores of the validation split, and the task of one run.
    assert check_svgs(page) == 6
    assert "Training loss over scored tokens" in page and 'class="line run1"' in page
    for shown in (
        "small, step 1,000",
        "0.2000 [0.1000, 0.3000]",
        "1.1000] at step 750",
        "3,412,736",
        "2:14",
        "+0.8000",
        "exact McNemar",
    ):
        assert shown in parsed.text, shown
    assert "0.0078" in parsed.text  # 2 / 2**8
    assert "large is right, small is wrong" in parsed.text and "the first 5 of 8" in parsed.text
    assert "question 0 <b>" in parsed.text and "small (acc 0): no" in parsed.text


def test_only_fields_that_differ_are_listed(runs):
    result = comparison.compare([epath.Path(runs / "small"), epath.Path(runs / "large")])
    rows = dict(result.config)
    assert rows.pop("optimizer.extra") == [json.dumps(HOSTILE, ensure_ascii=False), None]
    assert rows == {
        "train.steps": ["1000", "500"],
        "train.global_batch": ["8", "16"],
        "optimizer.learning_rate": ["0.1", "0.2"],
    }
    costs = dict(result.costs)
    assert costs["time in steps"] == ["2:14", "1:07"] and costs["targets scored in training"] == ["2,040,000"] * 2
    assert "tokens, without padding" not in costs  # neither run logged them


def test_device_hours_are_those_of_all_starts(runs, tmp_path):
    """8 devices for an hour, then 2 for half an hour: 9 device-hours, and a start whose time is unknown."""
    other = make_run(tmp_path)
    about = json.loads((other / "run.json").read_text())
    start = {"step": 0, "time": 0.0, "device": "TPU v4", "num_devices": 8, "processes": 1, "seconds": 3600.0}
    later = {**start, "step": 400, "num_devices": 2, "seconds": 1800.0}
    failed = {"step": 400, "time": 9e9, "device": "TPU v4", "num_devices": 2, "processes": 1}
    put(other / "run.json", about | {"device": "TPU v4", "num_devices": 2, "starts": [start, later, failed]})
    result = comparison.compare([epath.Path(runs / "small"), epath.Path(other)])
    assert dict(result.costs)["device-hours"] == [None, "9"]
    assert any(note.startswith("quickstart: device-hours leave out 1 start that ended") for note in result.notes)


def test_the_summary(runs, tmp_path, capsys):
    assert command([str(runs / "small"), str(runs / "large"), f"--output={tmp_path / 'page.html'}"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer.learning_rate" in printed and "train.steps" in printed
    assert "mine acc: large - small = +0.8000 [+0.5000, +1.0000], p = 0.00781 (exact McNemar): significant" in printed
    assert "right alone: small 0, large 8" in printed
    assert printed.splitlines()[-1] == (
        f"next: llmjax eval --workdir={runs / 'large'} --tasks=other   # a task that small was scored on"
    )


def test_three_runs_are_compared_with_the_first_one_that_has_the_task(runs, tmp_path):
    third = make_run(tmp_path / "parts").rename(tmp_path / "third")
    total = scores(2.0, documents=5)
    put(third / "eval/1000/test.json", {"step": 1000, "split": "test", "total": total, "sources": {}})
    put_task(third, 1000, "other", "acc", answer_lines("11"))
    put_task(third, 1000, "mine", "acc", answer_lines("0"))
    result = comparison.compare([epath.Path(path) for path in (runs / "large", runs / "small", third)])
    assert {(pair.task, pair.runs, pair.test is None) for pair in result.pairs} == {
        ("mine", ("large", "small"), False),
        ("mine", ("large", "third"), True),
        ("other", ("small", "third"), False),
    }
    assert [note for note in result.notes if "scored on other documents" in note]
    p_values = {pair.task: (pair.test and pair.test.p_value, pair.corrected) for pair in result.pairs if pair.test}
    assert p_values == {"mine": (2 / 2**8, 4 / 2**8), "other": (1.0, 1.0)}


def test_bad_input_is_one_line(runs, tmp_path):
    run, folder = str(runs / "small"), tmp_path / "empty"
    folder.mkdir()
    other = make_run(tmp_path)
    for split in (other / "eval").rglob("*.json"):
        split.unlink()
    corpus = tmp_path / "corpus"
    put(corpus / "config.json", {"curate": {}})
    for arguments, message in (
        ([], "takes 2 to 8 runs, and 0 were given"),
        ([run], "takes 2 to 8 runs, and 1 were given"),
        ([run] * 9, "takes 2 to 8 runs, and 9 were given"),
        ([run, str(tmp_path / "nowhere")], "no such folder; give the workdir of a run"),
        ([run, str(folder)], "no run there (no config.json)"),
        ([run, str(corpus)], "contains a corpus"),
        ([run, f"{run}/../small"], "the same run as"),
        ([run, str(other)], "quickstart has none): score them on the same split or task with `llmjax eval"),
        ([run, str(other), "--output="], "--output=: empty"),
        ([run, str(other), f"--output={folder}"], "this is a folder; give the HTML file to write"),
        ([run, str(other), f"--output={folder}/a/b.html"], "there is no folder"),
    ):
        with pytest.raises(UserError) as error:
            command(arguments)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_without_per_example_results(runs, tmp_path, capsys):
    other = make_run(tmp_path)
    put_task(other, 1000, "mine", "acc", answer_lines("0000000011"))
    (other / "eval/1000/mine.jsonl").unlink()
    put(other / "eval/1000/broken.json", "{")
    put(other / "eval/1000/foreign.json", {"by": "hand"})
    put(runs / "small/eval/1000/foreign.json", {"by": "hand"})
    assert command([str(runs / "small"), str(other), f"--output={tmp_path / 'page.html'}"]) == 0
    printed = capsys.readouterr().out
    for name in ("broken", "foreign"):
        assert f"note: {other / 'eval/1000'}/{name}.json cannot be read and was left out" in printed
    line = next(line for line in printed.splitlines() if "no test" in line)
    assert "mine, small and quickstart: no test: quickstart has no per-example results" in line
    assert "no per-example results" in PageParser((tmp_path / "page.html").read_text()).text
