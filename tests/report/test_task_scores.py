"""The part of the report about tasks."""

from llmjax.report.task_scores import render
from tests.report.runs import scores


def make_record(acc: float, *, extra: int = 0) -> dict:
    metrics = {"acc": {"value": acc, "low": acc - 0.1, "high": acc + 0.1}}
    metrics["mcc"] = {"value": None, "low": None, "high": None}
    metrics |= {f"acc/<{number}>": metrics["acc"] for number in range(extra)}
    return {"task": "mine", "step": 0, "n": 1234, "main": "acc", "metrics": metrics}


def test_tasks_have_a_table_and_with_several_steps_a_curve():
    evals = {"validation": {10: {"total": scores(1.0)}}}
    assert render(evals) == ""
    evals["mine"] = {20: make_record(0.625), 10: make_record(0.5)}
    evals["other"] = {20: make_record(0.25, extra=9) | {"note": "a limit < 1"}}
    page = render(evals)
    assert "mine, step 20, 1,234 examples" in page and "0.5250 to 0.7250" in page and "undefined" in page
    assert page.count("<svg") == 1 and "mine: acc" in page
    assert "a limit &lt; 1" in page
    assert "3 more scores of other" in page and "acc/&lt;8&gt;" in page and "<8>" not in page
