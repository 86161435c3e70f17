"""Examples of two runs are paired where they are the same; every kind of main score has its test, or a reason."""

import json

from etils import epath
import pytest

from llmjax.errors import UserError
from llmjax.evals import paired_tasks
from llmjax.evals.paired_tasks import Pair, TaskFiles
from tests.report.runs import answer_lines, put, put_task


def compare(folder, first: list[dict], second: list[dict], main: str = "acc", values=(None, None)) -> Pair:
    for run, lines, value in (("a", first, values[0]), ("b", second, values[1])):
        put_task(folder / run, 7, "mine", main, lines, value)
    return paired_tasks.pair("mine", *read(folder))


def read(folder) -> list[TaskFiles]:
    paths = {run: epath.Path(folder) / run / "eval/7/mine.json" for run in "ab"}
    return [TaskFiles(run=run, record=json.loads(path.read_text()), path=path) for run, path in paths.items()]


def test_wins_and_losses_of_answers(tmp_path):
    pair = compare(tmp_path, answer_lines("1100111111"), answer_lines("0011111111"))
    assert pair.test is not None and pair.test.name == "exact McNemar" and pair.is_binary
    assert (pair.num_first, pair.num_second, pair.num_equal, pair.test.p_value) == (2, 2, 6, 1.0)
    assert [example.index for example in pair.first_only] == [0, 1]
    example = pair.second_only[0]
    assert (example.text, example.target, example.predictions, example.scores) == (
        "question 2 <b>",
        "yes",
        ("no", "yes"),
        (0.0, 1.0),
    )


def test_a_lower_number_of_bits_is_better_and_texts_count_by_their_bytes(tmp_path):
    def make_lines(bits: list[float]) -> list[dict]:
        return [
            {"index": i, "input": f"text {i}", "target": None, "bytes": 10 + 90 * i, "bits_per_byte": value}
            for i, value in enumerate(bits)
        ]

    first, second = make_lines([2.0, 1.0, 3.0]), make_lines([1.0, 1.25, 3.0])
    values = [sum(line["bytes"] * line["bits_per_byte"] for line in lines) / 300 for lines in (first, second)]
    pair = compare(tmp_path, first, second, "bits_per_byte", values)
    assert pair.test is not None and pair.test.name == "sign flips"
    assert pair.test.difference.value == pytest.approx((-10 + 25) / 300)
    assert (pair.num_first, pair.num_second, pair.num_equal) == (1, 1, 1)
    assert [example.index for example in pair.first_only] == [1]
    assert [example.index for example in pair.second_only] == [0]


def test_a_correlation_is_compared_by_the_bootstrap(tmp_path):
    targets = [float(number) for number in range(40)]

    def make_lines(noise: float) -> list[dict]:
        return [
            {"index": i, "input": f"{i}", "target": y, "prediction": y + noise * (i * 17 % 23)}
            for i, y in enumerate(targets)
        ]

    pair = compare(tmp_path, make_lines(5), make_lines(0), "pearson", (0.5, 0.6))
    assert pair.test is not None and pair.test.name == "paired bootstrap"
    assert pair.test.difference.value and 0.2 < pair.test.difference.value < 1 and pair.test.p_value < 0.01
    assert not pair.first_only and not pair.second_only


def test_lines_of_lm_eval(tmp_path):
    """Their metrics are in a field of their own, and answers are numbers of the continuations."""

    def make_lines(answers: list[int]) -> list[dict]:
        return [
            {"index": i, "document": {"q": i}, "prompt": f"Q{i}", "continuations": [" no", " yes"], "target": 1}
            | {"prediction": answer, "metrics": {"acc": float(answer == 1)}}
            for i, answer in enumerate(answers)
        ]

    pair = compare(tmp_path, make_lines([1, 0]), make_lines([1, 1]), "acc", (0.5, 1.0))
    assert pair.test is not None and (pair.num_first, pair.num_second) == (0, 1)
    assert pair.second_only[0].predictions == ("no", "yes") and pair.second_only[0].target == "yes"


def test_pairs_that_cannot_be_tested_say_why(tmp_path):
    some = answer_lines("110")
    reasons = {
        "count": compare(tmp_path, some, answer_lines("11")).reason,
        "prompt": compare(tmp_path, some, answer_lines("110", prompt="Question")).reason,
        "aggregate": compare(tmp_path, some, some, "mcc", (0.1, 0.1)).reason,
    }
    put_task(tmp_path / "a", 7, "mine", "acc", some)
    reasons["main"] = paired_tasks.pair("mine", *read(tmp_path)).reason
    assert reasons["count"] == "a has 3 examples, b has 2; score both with the same --limit and file"
    assert "the input of example 0 is not the same in a and b" in reasons["prompt"]
    assert reasons["main"] == "a has the main score acc, b has mcc"
    assert reasons["aggregate"] == "mcc is neither a mean over examples nor a correlation; compare the intervals"


def test_missing_and_damaged_examples(tmp_path):
    compare(tmp_path, answer_lines("10"), answer_lines("11"))
    put(tmp_path / "b/eval/7/mine.jsonl", '{"index": 0}\nnot JSON\n')
    with pytest.raises(UserError, match=r"mine\.jsonl: line 2 is not the result of an example; remove the file"):
        paired_tasks.pair("mine", *read(tmp_path))
    (tmp_path / "b/eval/7/mine.jsonl").unlink()
    pair = paired_tasks.pair("mine", *read(tmp_path))
    assert pair.test is None and pair.reason.startswith("b has no per-example results (")


def test_other_settings_are_noted_and_p_values_corrected(tmp_path):
    put_task(tmp_path / "a", 7, "mine", "acc", answer_lines("0" * 8 + "1"), settings={"shots": 0, "path": "x"})
    put_task(tmp_path / "b", 7, "mine", "acc", answer_lines("1" * 9), settings={"shots": 2, "path": "y"})
    pair = paired_tasks.pair("mine", *read(tmp_path))
    assert pair.note == "shots 0 in a, 2 in b"
    untested = Pair(task="other", runs=("a", "b"), metric="acc", reason="none")
    [first, none, second] = paired_tasks.correct([pair, untested, pair])
    assert pair.test is not None and pair.test.p_value == pytest.approx(2 / 2**8)
    assert first.corrected == second.corrected == pytest.approx(4 / 2**8) and first.is_significant
    assert none.corrected is None and not none.is_significant
