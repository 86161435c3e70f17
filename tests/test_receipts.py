"""The receipts of shipped configs: what the TPU compiler made of their steps when they were last written."""

import importlib.util

import pytest

from tools import receipts


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("case", receipts.QUICK, ids=lambda case: case.name)
def test_the_compiler_makes_the_same_of_a_step(case):
    """If the change is meant: `python tools/receipts.py`, and say in the commit what moved."""
    recorded = receipts.from_text((receipts.FOLDER / f"{case.name}.txt").read_text())
    assert receipts.differences(recorded, receipts.make_receipt(case)) == []


def test_every_case_has_a_receipt():
    assert {f"{case.name}.txt" for case in receipts.CASES} == {path.name for path in receipts.FOLDER.glob("*.txt")}


def test_a_difference_names_what_moved():
    old = {"hbm_bytes": 1e9, "all-gather_count": 32, "kernel_splash_calls": 32}
    new = {"hbm_bytes": 1.01e9, "all-gather_count": 64, "kernel_splash_calls": 32, "all-to-all_count": 2}
    moved = ["all-gather_count: 32 -> 64 (+100.0%)", "all-to-all_count: 0 -> 2"]
    assert receipts.differences(old, new) == moved
    assert receipts.differences(old, {**old, "hbm_bytes": 1.03e9}) == ["hbm_bytes: 1000000000 -> 1030000000 (+3.0%)"]


def test_a_receipt_reads_back():
    found = {"fits": 1.0, "executed_over_model_flops": 1.2634, "hbm_bytes": 123456789.0}
    assert receipts.from_text(receipts.to_text(receipts.CASES[0], found)) == found
