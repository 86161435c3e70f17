"""Costs by hand: device-hours of all starts, energy, CO2 and money, and what is unknown."""

import json

import pytest

from llmjax.report import cost, write_report
from llmjax.report.files import read
from tests.report.runs import PageParser, put

H100 = {"step": 0, "time": 1000.0, "device": "NVIDIA H100 80GB HBM3", "num_devices": 8, "processes": 1}
A100 = {"step": 60, "time": 9000.0, "device": "NVIDIA A100-SXM4-80GB", "num_devices": 4, "processes": 1}
SET = {"price_per_device_hour": 2.0, "currency": "EUR", "device_watts": [], "pue": 1.1, "grid_intensity": 400.0}


def make_run(folder, starts, *, settings=None, last_time=None):
    put(folder / "run.json", {"restarts": [], "starts": starts})
    put(folder / "config.json", {"report": settings or {}})
    line = {"step": 100, "loss": 1.0, "step_seconds": 0.1} | ({} if last_time is None else {"time": last_time})
    put(folder / "metrics.jsonl", json.dumps(line) + "\n")
    return folder


def test_a_run_on_two_kinds_of_devices_sums_both(tmp_path):
    # 8 devices for an hour, then 4 for half an hour, up to the last line of the metrics.
    run = read(make_run(tmp_path, [{**H100, "seconds": 3600.0}, A100], last_time=9000.0 + 1800))
    result = cost.compute(run)
    assert result is not None
    assert [(device.starts, device.hours) for device in result.devices] == [(1, 8.0), (1, 2.0)]
    assert result.hours == 10
    # (8 h x 350 W + 2 h x 200 W) x 1.0 and (8 h x 700 W + 2 h x 400 W) x 1.58
    assert result.kwh == pytest.approx((3.2, 10.112))
    assert result.co2_kg == pytest.approx((3.2 * 0.03, 10.112 * 0.713))
    assert result.money is None


def test_parameters_of_the_config_replace_assumptions(tmp_path):
    starts = [{**H100, "seconds": 3600.0}, {**A100, "seconds": 1800.0}]
    result = cost.compute(read(make_run(tmp_path, starts, settings=SET)))
    assert result is not None
    assert result.kwh == pytest.approx((3.2 * 1.1, 6.4 * 1.1))
    assert result.co2_kg == pytest.approx((1.408, 2.816))
    assert result.money == pytest.approx(20.0)
    result = cost.compute(read(make_run(tmp_path, starts, settings={**SET, "device_watts": [500, 600]})))
    assert result is not None and result.kwh == pytest.approx((5.5, 6.6))


def test_the_page_and_report_json_have_the_costs(tmp_path):
    starts = [{**H100, "seconds": 3600.0}, {**A100, "seconds": 1800.0}]
    page = PageParser(write_report(make_run(tmp_path, starts, settings=SET)).read_text()).text
    for shown in ("3.52 to 7.04", "1.41 to 2.82", "EUR", "kWh = device-hours x W / 1,000 x PUE", "by report.pue"):
        assert shown in page
    written = json.loads((tmp_path / "report.json").read_text())["cost"]
    assert written["device_hours"] == 10 and written["money"] == 20 and written["kwh"] == pytest.approx([3.52, 7.04])


def test_an_unknown_device_has_no_energy_and_no_price_no_money(tmp_path):
    starts = [{**H100, "seconds": 3600.0}, {**A100, "device": "TPU v6 lite", "seconds": 1800.0}]
    folder = make_run(tmp_path, starts)
    result = cost.compute(read(folder))
    assert result is not None and result.hours == 10
    assert (result.kwh, result.co2_kg, result.money) == (None, None, None)
    page = PageParser(write_report(folder).read_text()).text
    assert "unknown: no power of TPU v6 lite" in page and "set report.device_watts" in page
    assert "USD" not in page


def test_a_process_on_cpus_is_one_device_and_a_start_without_a_step_is_named(tmp_path):
    cpu = {"step": 0, "time": 0.0, "device": "cpu", "num_devices": 8, "processes": 2, "seconds": 7200.0}
    failed = {"step": 0, "time": 8000.0, "device": "cpu", "num_devices": 8, "processes": 2}
    folder = make_run(tmp_path, [cpu, failed, {**cpu, "time": 9000.0}], last_time=100.0)
    result = cost.compute(read(folder))
    assert result is not None and result.hours == 8 and result.unmeasured == 1
    assert result.kwh == pytest.approx((8 * 0.015, 8 * 0.35 * 1.58))
    assert "Not counted: 1 start that ended before" in write_report(folder).read_text()


def test_a_run_without_recorded_starts_says_so(tmp_path):
    folder = make_run(tmp_path, [])
    assert cost.compute(read(folder)) is None
    assert "run.json does not record when the run started" in write_report(folder).read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == {"cost": None}
