"""The error that a plan states is the one that tools/calibrate_plan.py printed into the documentation."""

import statistics

import pytest

from llmjax.plan import predict
from tests.docs.pages import DOCS
from tools import calibrate_plan

SECTION = (DOCS / "plan.md").read_text().partition("## How far it is off")[2].partition("\n## ")[0]
QUICK, _, FULL = SECTION.partition("\n### The full depth\n")


def ratios(text: str) -> dict[str, float]:
    """Run -> predicted over published seconds, of the rows of a table."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: float(row[-1]) for row in rows[2:]}


@pytest.mark.parametrize(("text", "stated"), [(QUICK, predict.QUICK_CALIBRATION), (FULL, predict.FULL_CALIBRATION)])
def test_the_stated_error_is_that_of_the_table(text, stated):
    """Both have two digits; the median of an even number of runs may round the other way."""
    found = list(ratios(text).values())
    assert (stated.runs, stated.lowest, stated.highest) == (len(found), min(found), max(found))
    assert stated.median == pytest.approx(statistics.median(found), abs=0.011)
    line = f"runs {stated.runs}, median {stated.median:.2f}, lowest {stated.lowest:.2f}, highest {stated.highest:.2f}"
    assert line in text.splitlines()


def test_the_table_has_every_run():
    assert list(ratios(QUICK)) == [run.key for run in calibrate_plan.RUNS]
    assert ratios(FULL).keys() <= ratios(QUICK).keys()


def test_published_flops_become_seconds():
    """MaxText's 16B decoder at 120 TFLOP/s: 6 rows of 2,048 tokens, attention without the causal half."""
    run = next(run for run in calibrate_plan.RUNS if run.key == "16B-v5e-256")
    weights = 32 * (4 * 4096 * 8192 + 3 * 4096 * 28672) + 4096 * 32_000
    flops = 6 * 2048 * (6 * weights + 12 * 32 * 8192 * 2048)
    assert run.measured_seconds(run.resolve()) == pytest.approx(flops / 120e12)
