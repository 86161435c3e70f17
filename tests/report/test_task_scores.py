"""The part of the report about tasks, and the reliability plot."""

import xml.etree.ElementTree as ElementTree

from llmjax.report.reliability import draw_reliability
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
    evals["other"] = {20: make_record(0.25, extra=9)}
    page = render(evals)
    assert "mine, step 20, 1,234 examples" in page and "0.5250 to 0.7250" in page and "undefined" in page
    assert page.count("<svg") == 1 and "mine: acc" in page
    assert "3 more scores of other" in page and "acc/&lt;8&gt;" in page and "<8>" not in page


def test_the_reliability_plot_has_a_bar_for_each_bin_with_examples():
    counts, confidence, accuracy = [0, 5, 10, 0], [0, 0.3, 0.6, 0], [0, 0.2, 1.0, 0]
    plot = draw_reliability(counts, confidence, accuracy, title="a < b")
    root = ElementTree.fromstring(plot)
    bars = [element for element in root.iter() if element.get("class") == "bar"]
    heights = [float(bar.get("height", "")) for bar in bars]
    assert len(bars) == 2 and heights[0] / heights[1] == 0.2
    assert float(bars[1].get("y", "")) + heights[1] == float(bars[0].get("y", "")) + heights[0]  # on the axis
    assert [float(bar.get("opacity", "")) for bar in bars] == [0.62, 1.0]
    assert "10 examples: confidence 0.600, accuracy 1.000" in plot and "a &lt; b" in plot
