"""The report tells what the files hold, nothing else, loads nothing, and survives files that are absent or odd."""

import gzip
from html.parser import HTMLParser
import json
import math
import pathlib
import re
import xml.etree.ElementTree as ElementTree

from etils import epath
import numpy as np
import pytest

from llmjax.report import plot, write_report
from llmjax.report.markup import clean, figure
from llmjax.report.profile import read_profile

HOSTILE = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m \ud800 </pre></svg>"


def make_run(folder: pathlib.Path, *, steps: int = 1000, every: int = 5) -> pathlib.Path:
    """A run folder in the real format, with a restart, skipped steps, a NaN and hostile text in it."""
    rng, run = np.random.default_rng(0), folder / "quickstart"
    lines = []
    for step in range(every, steps + 1, every):
        lines.append(
            {
                "step": step,
                "loss": 2.1 + 6.2 * math.exp(-step / 120) + 0.06 * rng.standard_normal() if step != 505 else math.nan,
                "batch_digest": int(rng.integers(2**32)),
                "total_targets": step * 2040,
                "tokens_per_second": 15200 + 300 * rng.standard_normal() - (6000 if step in (every, 405) else 0),
                "step_seconds": 0.134,
                "data_wait_seconds": 0.0002 + 0.0001 * rng.random(),
                "learning_rate": 1e-3 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
                "grad_norm": 0.8 + 3 * math.exp(-step / 60) + 0.1 * rng.random() + (9 if step == 700 else 0),
                "skipped_steps": 3 if step > 500 else 0,
                "mfu": None,
            }
        )
    put(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for step, loss in ((250, 2.95), (500, 2.41), (750, 2.27), (1000, 2.2345678)):
        total = scores(loss, tokens=124_000, documents=87)
        body = {"step": step, "parameters": "EMA of the parameters", "fingerprint": "ab12", "split": "validation"}
        put(
            run / f"eval/{step}/validation.json", {**body, "total": total, "sources": {"stdlib": total, "notes": total}}
        )
    put(
        run / "eval/1000/test.json",
        {"step": 1000, "split": "test", "total": scores(2.3), "sources": {"a": scores(2.3)}},
    )
    samples = [("def main(", "):\n    print('hi')\n    if x < 3 & y:\n        return None\n"), ("class ", HOSTILE)]
    drawn = [{"step": 1000, "prompt": p, "text": t, "seed": 0, "temperature": 0.8, "top_p": 0.95} for p, t in samples]
    put(run / "samples.json", drawn)
    put(
        run / "run.json",
        {
            "run_id": "5f0c9a1b77de",
            "started": 1_790_000_000.0,
            "restarts": [{"step": 400, "time": 1_790_000_400.0}],
            "device": "cpu",
            "num_devices": 1,
            "processes": 1,
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "backend": "jit",
            "versions": {"llmjax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
            "parameters": 3_412_736,
            "parameters_by_part": {"embedding": 524_288, "blocks": 2_888_320, "norm": 128},
            "optimizer": "adamw",
            "evaluated": "EMA of the parameters",
            "unsharded_params": ["blocks.up ('layers', 'embed', 'mlp') (4, 128, 511): 1,046,528 bytes stay unsharded"],
        },
    )
    config = {
        "seed": 0,
        "data": {"store": "", "packing": "best_fit", "seq_len": 256},
        "train": {"steps": steps, "global_batch": 8},
    }
    put(run / "config.json", config)
    put(run / "store/manifest.json", manifest())
    source = {"documents": 1234, "tokens": 10_481_661, "text_bytes": 9_876_543, "rows": 40_960, "density": 0.99961}
    put(run / "data.json", {"stdlib": {**source, "samples": 8000, "epochs": 0.195312}, "notes": source})
    return run


def scores(loss: float, tokens: int = 100, documents: int = 3) -> dict:
    rest = {"nats": loss * tokens, "tokens": tokens, "text_bytes": 4 * tokens, "documents": documents}
    bits = loss / math.log(2) / 4
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits, "accuracy": 0.5432, **rest}


def manifest() -> dict:
    split = {"documents": 1234, "tokens": 2_345_678, "text_bytes": 9_876_543, "fingerprint": "cd34"}
    source = {"path": "stdlib:", "train": split, "validation": split, "test": {**split, "documents": 0, "tokens": 0}}
    return {
        "version": 1,
        "fingerprint": "0123456789abcdef" * 4,
        "tokenizer": {"sha256": "ef" * 32, "vocab_size": 4096, "kind": "sentencepiece", "lossless": True},
        "sources": {"stdlib": source, "notes": source},
        "python": "3.11.9",
        "corpus_sha256": "fedcba9876543210" * 4,
        "compressors": {
            "gzip -9": {"concatenated": 124_000, "per_document": 136_000},
            "xz -9": {"concatenated": 99_200, "per_document": 135_160},
        },
    }


def put(path: pathlib.Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


class Reader(HTMLParser):
    """Elements in order, whether each is closed by its own tag, and the text outside of style."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += f"{data} "


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


def check_svgs(text: str) -> int:
    found = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for drawn in found:
        root = ElementTree.fromstring(drawn)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
        numbers = [value for item in root.iter() for value in item.attrib.values() if re.fullmatch(r"-?[\d.]+", value)]
        assert numbers and "nan" not in " ".join(numbers)
    return len(found)


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


def trace_event(name: str, ts: float, dur: float, tid: int = 1, pid: int = 1, **args) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "ts": ts, "dur": dur, "name": name, "args": args}


def put_trace(run: pathlib.Path, events: list, time: str = "2026_01_01_00_00_00") -> pathlib.Path:
    path = run / "profile/plugins/profile" / time / "host.trace.json.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_the_profile_lists_operations_without_what_is_inside_them(tmp_path):
    """A loop of 100 us whose body takes 70 us; an event of the host and one of another thread at the same time."""
    run = make_run(tmp_path, steps=10)
    put_trace(run, [trace_event("old", 0, 5, hlo_op="old")], time="2025_12_31_00_00_00")
    loop = [trace_event("while.1", 10, 100, hlo_op="while.1"), trace_event("body <b>", 20, 30, hlo_op="body <b>")]
    loop += [trace_event("body <b>", 60, 40, hlo_op="body <b>"), trace_event("inner", 65, 10, hlo_op="inner")]
    other = [trace_event("dot.2", 15, 900, tid=2, hlo_op="dot.2"), trace_event("PjitFunction", 0, 5000)]
    put_trace(run, [*loop, *other, {}])
    found = [(op.name, round(op.seconds * 1e6), op.count) for op in read_profile(epath.Path(run)).operations]
    assert found == [("dot.2", 900, 1), ("body <b>", 60, 2), ("while.1", 30, 1), ("inner", 10, 1)]
    page = write_report(run).read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.split("<h2>Profile</h2>")[1].split("</table>")[0])
    assert cells[4:8] == ["body &lt;b&gt;", "0.060", "6.0%", "2"]


def test_an_accelerators_operations_are_counted_once(tmp_path):
    """They are on its line "XLA Ops", and again on a stream."""
    lines = [(1, "XLA Ops"), (2, "Stream #7")]
    events = [{"ph": "M", "pid": 3, "tid": tid, "name": "thread_name", "args": {"name": name}} for tid, name in lines]
    events += [trace_event("fusion.1", 0, 50, tid=tid, pid=3, hlo_op="fusion.1") for tid, _ in lines]
    put_trace(tmp_path, events)
    (found,) = read_profile(epath.Path(tmp_path)).operations
    assert (found.name, found.count) == ("fusion.1", 1)


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"[]"), gzip.compress(b'{"traceEvents": [1]}')])
def test_a_damaged_profile_is_named(tmp_path, content):
    run = make_run(tmp_path, steps=10)
    put_trace(run, []).write_bytes(content)
    page = write_report(run).read_text()
    assert "<h2>Profile</h2>" not in page and f"Not readable: {run / 'profile'}" in page


def test_without_a_trace_there_is_no_profile(full):
    assert "Profile" not in full


def test_a_long_run_stays_small_and_keeps_its_spikes():
    points = [(float(i), math.sin(i / 500)) for i in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    kept = plot.thin(points)
    assert len(kept) <= plot.POINTS_SHOWN + 2
    assert (77_777.0, 50.0) in kept and kept == sorted(kept) and set(kept) <= set(points)


def test_few_points_are_not_called_smoothed(tmp_path, full):
    assert "training, smoothed" in full
    put(tmp_path / "metrics.jsonl", "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 100)))
    text = write_report(tmp_path).read_text()
    assert "training, each logged step" in text and "smoothed" not in text


def test_smoothing_starts_unbiased_and_passes_over_what_is_broken():
    assert plot.smooth([(1, 4.0), (2, math.nan), (3, 4.0)], 10) == [(1, 4.0), (3, 4.0)]
    (_, first), (_, second) = plot.smooth([(1, 0.0), (2, 1.0)], 2)
    assert first == 0.0 and second == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (2.03, 2.31, [2.1, 2.2, 2.3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert plot.ticks(low, high, 5) == pytest.approx(expected)


def test_log_ticks_are_round():
    assert plot.log_ticks(0.9, 120) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    assert plot.log_ticks(1e-6, 1.5) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((None, "—"), (3.41234, "3.412"), (1834.4, "1,834"), (12_345, "12.3\u202fk"), (4.567e6, "4.57\u202fM")),
        *(
            (0.000291, "0.000291"),
            (7, "7"),
            (2e12, "2\u202fT"),
            (math.inf, "inf"),
            (-12_345, "-12.3\u202fk"),
            (0.0, "0"),
        ),
    ],
)
def test_figures_read_well(value, shown):
    assert figure(value) == shown


def test_clean_leaves_good_text_alone():
    assert clean("naïve 漢字 🙂\n\tx") == "naïve 漢字 🙂\n\tx"
