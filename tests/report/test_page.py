"""The report has the content of the files, loads no resources, and handles missing and odd files."""

import json
import math
import re

import pytest

from llmjax.report import write_report
from tests.report.runs import PageParser, check_svgs, make_run, manifest, put


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("runs"))).read_text()


def test_headline_compares_scores_with_compressors(page):
    text = PageParser(page).text
    for shown in ("2.2346", "9.34", "0.8059"):  # loss, perplexity and bits per byte of step 1000, not of an earlier one
        assert shown in text
    # 8 x 99,200 / 496,000 bytes = 1.6 bits per byte
    order = [
        "this model",
        "0.806",
        "xz -9, concatenated",
        "1.6",
        "gzip -9, concatenated",
        "xz -9, per document",
        "2.18",
    ]
    positions = [text.index(item) for item in order]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    "shown",
    [
        *("3,412,736", "524,288", "84.6%", "adamw", "5f0c9a1b77de", "EMA of the parameters", "jax 0.10.2", "2,345,678"),
        *(
            "fedcba9876543210",
            "3.11.9",
            "0.99961",
            "0.19531",
            "10,481,661",
            "54.32%",
            "stay unsharded",
            "temperature 0.8",
            "4.21",
        ),
        *("2,040,000", "step 1,000 of 1,000", "2026-09-21 14:13 UTC"),
    ],
)
def test_the_page_has_the_numbers_of_the_files(page, shown):
    assert shown in PageParser(page).text


def test_restarts_skipped_steps_and_nan_losses_are_marked(page):
    assert page.count('class="mark restart"') == 5, "one in each plot"
    assert "restart at step 400" in page
    assert "3 skipped up to step 505" in page
    assert page.count('class="nonfinite"') == 1 and "nan at step 505" in page


def test_the_page_loads_no_resources_and_runs_no_scripts(page):
    reader = PageParser(page)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", page)


def test_text_of_the_model_is_escaped(page):
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quoted&quot;" in page
    assert "\x00" not in page and "\x1b" not in page
    assert "if x &lt; 3 &amp; y:" in page


def test_names_of_files_are_escaped(tmp_path):
    run = make_run(tmp_path)
    (odd := tmp_path / "<b>&'odd'").parent.mkdir(exist_ok=True)
    run.rename(odd)
    hostile = manifest()
    hostile["sources"] = {"<i>": hostile["sources"]["stdlib"]}
    hostile["compressors"] = {"</svg><b>": {"concatenated": 5}}
    put(odd / "store/manifest.json", hostile)
    text = write_report(odd).read_text()
    assert (
        "<b>" not in text.replace("<summary><b>", "")
        and "&lt;i&gt;" in text
        and "<i>" not in text.replace("<i></i>", "")
    )
    check_svgs(text)


def test_plots_are_well_formed(page):
    assert check_svgs(page) == 6  # compression, loss, learning rate, gradient norm, tokens a second, wait for data


def test_mfu_has_a_plot_if_it_is_logged(tmp_path):
    run = make_run(tmp_path)
    put(run / "metrics.jsonl", "".join(f'{{"step": {n}, "loss": 1.0, "mfu": 0.4125}}\n' for n in (1, 2, 3)))
    text = write_report(run).read_text()
    assert "median MFU" in text and "41.2%" in text and "MFU, %" in text


def test_missing_files_are_named_with_the_command_that_writes_them(tmp_path):
    text = PageParser(write_report(tmp_path).read_text()).text
    for command in ("train --config=NAME", "prepare --config=NAME", "eval"):
        assert f"llmjax {command} --workdir={tmp_path}" in text
    for missing in (
        "No step was logged",
        "no run.json",
        "no token store",
        "no data.json",
        "No samples",
        "no config.json",
    ):
        assert missing in text


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "eval", "samples.json", "run.json", "config.json", "data.json", "store"]
)
def test_any_file_may_be_missing(tmp_path, missing):
    run = make_run(tmp_path)
    (run / missing).rename(tmp_path / "elsewhere")
    text = write_report(run).read_text()
    PageParser(text)
    assert 'class="missing"' in text
    check_svgs(text)


@pytest.mark.parametrize("damaged", ["samples.json", "run.json", "config.json", "data.json", "store/manifest.json"])
def test_the_page_names_a_damaged_file(tmp_path, damaged):
    run = make_run(tmp_path)
    put(run / damaged, '{"torn": ')
    assert f"Not readable: {run / damaged}" in PageParser(write_report(run).read_text()).text


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1, "loss": 8.25}],
        [{"step": 1, "loss": math.nan, "grad_norm": math.inf}],
        [{"step": step, "loss": math.nan, "step_seconds": 0.1} for step in range(5)],
        [{"step": 1, "loss": 0.0, "learning_rate": 0.0}, {"step": 2, "loss": 0.0, "learning_rate": 0.0}],
        [{"step": 1, "loss": 1e-30}, {"step": 2, "loss": 1e30}, {"step": 3, "loss": -1.0}],
        [{"step": 1, "loss": 3e38}, {"step": 2, "loss": 1e-38}],
        [{"step": 1}],
        [{"step": 1, "data_wait_seconds": 0.1}, {"step": 2, "step_seconds": 0.0, "data_wait_seconds": 0.0}],
    ],
)
def test_few_or_odd_metrics_are_plotted_or_explained(tmp_path, lines):
    put(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(tmp_path).read_text()
    PageParser(text)
    if check_svgs(text) == 0:
        assert "No finite value of Loss was logged" in text


def test_few_points_are_not_smoothed(tmp_path, page):
    assert "training, smoothed" in page
    put(tmp_path / "metrics.jsonl", "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 100)))
    text = write_report(tmp_path).read_text()
    assert "training, each logged step" in text and "smoothed" not in text


PLAN = {
    "topology": "v6e:16x16",
    "devices": 256,
    "mesh": {"data": 1, "fsdp": 256},
    "compiler": "libtpu 0.0.52",
    "quick": True,
    "step_seconds": 0.067,
    "step_tokens": 2048,
    "mfu": 0.5,
    "parts": {"matmuls": 0.04, "elementwise": 0.02, "attention kernels": 0.007, "grouped matmuls": 0.0},
    "hbm_bytes": 28 * 2**30,
    "hbm_limit": 31 * 2**30,
    "predicted_over_measured": {"runs": 16, "median": 0.97, "lowest": 0.86, "highest": 1.17},
}


def test_a_plan_is_shown_beside_what_the_run_measured(tmp_path):
    """The run's steps take 0.134 s, twice the planned time."""
    run = make_run(tmp_path)
    put(run / "plan.json", PLAN)
    page = write_report(run).read_text()
    assert check_svgs(page) == 7
    text = PageParser(page).text
    for shown in ("v6e:16x16, 256 devices, fsdp 256, libtpu 0.0.52, quick depth", "0.067 s", "0.134 s", "2.00"):
        assert shown in text
    assert "attention kernels" in text and "grouped matmuls" not in text  # what takes no time has no bar
    assert "28.00 GiB" in text and "0.86 to 1.17" in text
    assert "measured, 1 x cpu" in text and "30,567" in text  # 2048 / 0.067 tokens a second


def test_a_plan_without_a_run_or_a_time_is_shown(tmp_path):
    put(tmp_path / "plan.json", {**PLAN, "step_seconds": None, "parts": None, "mfu": None})
    text = PageParser(write_report(tmp_path).read_text()).text
    assert "No time was predicted" in text and "measured, median" not in text


def test_without_a_trace_and_a_plan_there_are_no_sections_of_them(page):
    assert "Profile" not in page and "<h2>Plan</h2>" not in page
