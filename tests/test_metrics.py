"""metrics.jsonl loses, repeats and rounds no number when a run is killed; the progress line shows the time left."""

import json
import logging
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from llmjax import atomic, metrics
from llmjax.errors import UserError
from llmjax.metrics import MetricsLog, ProgressLine, progress_line, read_metrics


def record(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "batch_digest": step * 7, "total_targets": step * 100}


def write_steps(workdir, steps, **kwargs) -> None:
    with MetricsLog(workdir, primary=True, **kwargs) as log:
        for step in steps:
            log.write(record(step))


def raw_steps(workdir: pathlib.Path) -> list[int]:
    """The steps as another program reads them: every line must be valid JSON."""
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_float32_values_are_read_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([0.1, 1e-45, np.nan, np.inf, -np.inf])])
    with MetricsLog(tmp_path, primary=True) as log:
        for step, value in enumerate(values):
            log.write({"step": step, "loss": value})
    back = np.array([line["loss"] for line in read_metrics(tmp_path)])
    assert back.dtype == np.float64
    np.testing.assert_array_equal(back, values.astype(np.float64))


def test_device_scalars_are_written_as_plain_numbers(tmp_path):
    with MetricsLog(tmp_path, primary=True) as log:
        log.write(
            {"step": np.int32(3), "loss": np.ones((1,), np.float32), "batch_digest": np.uint32(2**32 - 1), "mfu": None}
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "loss": 1.0, "batch_digest": 4294967295, "mfu": null}\n'


def test_a_resumed_run_removes_lines_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, range(10, 60, 10))
    write_steps(tmp_path, [40, 50, 60], resume_step=30)
    assert raw_steps(tmp_path) == [10, 20, 30, 40, 50, 60]


def test_a_fresh_start_removes_every_line(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])
    assert raw_steps(tmp_path) == [1]


@pytest.mark.parametrize("torn", [b'{"step": 30, "lo', b'{"step": 30, "loss": 1.0', b'{"step": 3', b"\0\0", b"\xff"])
def test_an_incomplete_last_line_is_dropped_and_not_continued(tmp_path, torn):
    write_steps(tmp_path, [10, 20])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
    write_steps(tmp_path, [30], resume_step=20)
    assert raw_steps(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"step": true}', b'{"step": "1"}', b'"step"', b"1" * 5000])
def test_invalid_lines_are_dropped(tmp_path, line):
    write_steps(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_a_folder_named_metrics_jsonl_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    for read in (lambda: read_metrics(tmp_path), lambda: MetricsLog(tmp_path, primary=True)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(Is a directory\)"):
            read()


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced"])
def test_a_log_that_is_removed_during_a_run_stops_it(tmp_path, change):
    with MetricsLog(tmp_path, primary=True) as log:
        log.write(record(1))
        path = tmp_path / "metrics.jsonl"
        path.unlink() if change == "removed" else path.rename(tmp_path / "other")
        if change == "replaced":
            path.touch()
        with pytest.raises(UserError, match=r"metrics\.jsonl was removed, renamed or replaced"):
            log.write(record(2))


@pytest.mark.parametrize("file", ["metrics.jsonl", "events"])
def test_a_full_disk_raises_an_error_with_the_name_of_the_file(tmp_path, file):
    """A limit on file size stands for the full disk. Nothing is printed, then or at the end of the process."""
    code = f"""
import resource, signal, sys
from llmjax.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
log = MetricsLog(sys.argv[1], primary=True)
try:
    for step in range(1000):
        if {file == "events"}:
            log.scalars(step, {{"validation/loss": 1.0}})
        else:
            log._sinks = []
            log.write({{"step": step, "loss": 1.0}})
except OSError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert process.stderr == "" and process.stdout.startswith(f"[Errno 27] File too large: '{tmp_path / file}")


def test_a_later_line_replaces_earlier_lines_of_the_same_steps(tmp_path):
    lines = [record(10, 1.0), record(20, 1.0), record(30, 1.0), record(20, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(10, 1.0), (20, 2.0)]
    assert [line["step"] for line in read_metrics(tmp_path, last_step=19)] == [10]
    assert read_metrics(tmp_path / "absent") == []


def test_a_step_is_never_logged_twice(tmp_path):
    with MetricsLog(tmp_path, primary=True) as log:
        log.write(record(5))
        with pytest.raises(AssertionError, match="step 5 is logged after step 5"):
            log.write(record(5))
    assert raw_steps(tmp_path) == [5]


def test_lines_are_on_disk_when_the_process_is_killed(tmp_path):
    code = (
        "import sys, os, signal; from llmjax.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], primary=True)\n"
        "for step in (1, 2, 3): log.write({'step': step, 'loss': 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert raw_steps(tmp_path) == [1, 2, 3]


def test_only_the_primary_process_writes(tmp_path):
    with MetricsLog(tmp_path / "run", primary=False) as log:
        log.write(record(1))
        log.scalars(1, {"x": 1.0})
    assert not (tmp_path / "run").exists()


def test_an_object_store_gets_complete_files(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "is_remote", lambda path: True)
    write_steps(tmp_path, [1, 2, 3])
    log = MetricsLog(tmp_path, primary=True, resume_step=2, rewrite_seconds=3600)
    log.write(record(3))
    log.write(record(4))
    assert raw_steps(tmp_path) == [1, 2], "rewritten before rewrite_seconds"
    log.flush()
    assert raw_steps(tmp_path) == [1, 2, 3, 4]
    log.write(record(5))
    log.close()
    log.close()
    assert raw_steps(tmp_path) == [1, 2, 3, 4, 5]
    assert os.listdir(tmp_path) == ["metrics.jsonl"], "events or temporary files need append or rename"


def test_an_object_store_is_written_at_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "is_remote", lambda path: True)
    log = MetricsLog(tmp_path, primary=True, rewrite_seconds=0.0)
    log.write(record(1))
    assert raw_steps(tmp_path) == [1]


def test_a_path_with_a_scheme_is_remote(tmp_path):
    assert atomic.is_remote("gs://bucket/run") and not atomic.is_remote(tmp_path) and not atomic.is_remote("runs/a")


def test_tensorboard_events_contain_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsLog(tmp_path, primary=True) as log:
        log.write({**record(7, loss=2.5), "mfu": None})
        log.scalars(7, {"validation/loss": 3.25, "validation/split": "text"})
    (events,) = (tmp_path / "events").iterdir()
    scalars = {}
    data = events.read_bytes()
    while data:  # TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        scalars.update({value.tag: (event.step, value.simple_value) for value in event.summary.value})
        data = data[16 + length :]
    assert scalars == {"train/loss": (7, 2.5), "train/total_targets": (7, 700.0), "validation/loss": (7, 3.25)}


FULL = {
    "step": 120,
    "loss": 3.4117,
    "tokens_per_second": 1833.6,
    "learning_rate": 2.9e-4,
    "grad_norm": 1.0199,
    "step_seconds": 0.3,
    "data_wait_seconds": 0.0003,
    "skipped_steps": 0,
    "mfu": None,
}


def test_the_progress_line_is_as_documented():
    expected = "step  120/1000  loss 3.412  1,834 tok/s  lr 2.9e-4  grad 1.02  data 0.1%  ETA 4:31"
    assert progress_line(FULL, 1000, 271.2) == expected


def test_the_progress_line_omits_missing_values_and_shows_all_others():
    assert progress_line({"step": 3, "loss": math.nan}, 5, math.nan) == "step 3/5  loss nan"
    full = progress_line({**FULL, "mfu": 0.412, "skipped_steps": 2, "learning_rate": 0.0}, 1000, 90061)
    assert "mfu 41.2%" in full and "skipped 2" in full and "lr 0 " in full and full.endswith("ETA 1d 01:01:01")


def test_the_time_left_includes_evaluations_between_steps(caplog):
    caplog.set_level(logging.INFO, logger="llmjax")
    now = [100.0]
    line = ProgressLine(100, clock=lambda: now[0])
    line.update({"step": 10, "step_seconds": 1.0})  # mostly compilation, so no estimate yet
    now[0] += 40.0
    line.update({"step": 20, "step_seconds": 1.0})  # 4 s a step with an evaluation in between: 80 steps of 4 s
    assert [message.partition("ETA ")[2] for message in caplog.messages] == ["", "5:20"]
    assert all(record.progress for record in caplog.records)


def test_mfu_of_eight_h100():
    # eight H100s do 7.912e15 FLOPs a second; 4e6 tokens of 0.8e9 FLOPs use 3.2e15 of them
    used = metrics.mfu(flops_per_second=8e8 * 4e6, device_kind="NVIDIA H100 80GB HBM3", num_devices=8)
    assert used == pytest.approx(3.2 / 7.912)
    assert metrics.mfu(flops_per_second=8e8 * 4e6, device_kind="cpu", num_devices=8) is None
