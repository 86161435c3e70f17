"""The report tells what the files hold, nothing else, loads nothing, and survives files that are absent or odd."""

import json
import math
import re

import pytest

from llmjax.report import write_report
from tests.report.runs import Reader, check_svgs, make_run, manifest, put


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("runs"))).read_text()


def test_headline_holds_the_scores_beside_the_compressors(full):
    text = Reader(full).text
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
    places = [text.index(item) for item in order]
    assert places == sorted(places)


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
def test_numbers_of_the_files_are_in_the_page(full, shown):
    assert shown in Reader(full).text


def test_restarts_skipped_steps_and_broken_losses_are_marked(full):
    assert full.count('class="mark restart"') == 5, "one in each plot"
    assert "restart at step 400" in full
    assert "3 skipped up to step 505" in full
    assert full.count('class="broken"') == 1 and "nan at step 505" in full


def test_nothing_is_loaded_and_nothing_runs(full):
    reader = Reader(full)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", full)


def test_text_of_the_model_cannot_break_the_page(full):
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quoted&quot;" in full
    assert "\x00" not in full and "\x1b" not in full
    assert "if x &lt; 3 &amp; y:" in full


def test_names_of_files_cannot_break_the_page(tmp_path):
    run = make_run(tmp_path)
    (odd := tmp_path / "<b>&'odd'").parent.mkdir(exist_ok=True)
    run.rename(odd)
    broken = manifest()
    broken["sources"] = {"<i>": broken["sources"]["stdlib"]}
    broken["compressors"] = {"</svg><b>": {"concatenated": 5}}
    put(odd / "store/manifest.json", broken)
    text = write_report(odd).read_text()
    assert "<b>" not in text and "&lt;i&gt;" in text and "<i>" not in text.replace("<i></i>", "")
    check_svgs(text)


def test_every_plot_is_well_formed(full):
    assert check_svgs(full) == 6  # compression, loss, learning rate, gradient norm, tokens a second, wait for data


def test_mfu_has_a_plot_where_it_is_known(tmp_path):
    run = make_run(tmp_path)
    put(run / "metrics.jsonl", "".join(f'{{"step": {n}, "loss": 1.0, "mfu": 0.4125}}\n' for n in (1, 2, 3)))
    text = write_report(run).read_text()
    assert "median MFU" in text and "41.2%" in text and "MFU, %" in text


def test_each_absent_file_is_named_with_the_command_that_makes_it(tmp_path):
    text = Reader(write_report(tmp_path).read_text()).text
    for command in ("train --config=NAME", "prepare --config=NAME", "eval"):
        assert f"llmjax {command} --workdir={tmp_path}" in text
    for absent in (
        "No step was logged",
        "no run.json",
        "no token store",
        "no data.json",
        "No samples",
        "no config.json",
    ):
        assert absent in text


@pytest.mark.parametrize(
    "absent", ["metrics.jsonl", "eval", "samples.json", "run.json", "config.json", "data.json", "store"]
)
def test_any_one_file_may_be_absent(tmp_path, absent):
    run = make_run(tmp_path)
    (run / absent).rename(tmp_path / "elsewhere")
    text = write_report(run).read_text()
    Reader(text)
    assert 'class="missing"' in text
    check_svgs(text)


@pytest.mark.parametrize("damaged", ["samples.json", "run.json", "config.json", "data.json", "store/manifest.json"])
def test_a_damaged_file_is_named(tmp_path, damaged):
    run = make_run(tmp_path)
    put(run / damaged, '{"torn": ')
    assert f"Not readable: {run / damaged}" in Reader(write_report(run).read_text()).text


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
def test_few_or_odd_metrics_are_drawn_or_said(tmp_path, lines):
    put(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(tmp_path).read_text()
    Reader(text)
    if check_svgs(text) == 0:
        assert "No finite value of Loss was logged" in text


def test_few_points_are_not_called_smoothed(tmp_path, full):
    assert "training, smoothed" in full
    put(tmp_path / "metrics.jsonl", "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 100)))
    text = write_report(tmp_path).read_text()
    assert "training, each logged step" in text and "smoothed" not in text


def test_without_a_trace_there_is_no_profile(full):
    assert "Profile" not in full
