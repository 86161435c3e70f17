"""`llmjax watch` shows the content of a run's files, live or once, without JAX."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys

from etils import epath
import pytest

from llmjax.cli import main as cli
from llmjax.errors import UserError
from llmjax.report import terminal as watch
from llmjax.run import workdir as workdirs
from tests import jobs
from tests.report.runs import HOSTILE, make_run, put


def snapshot(run: pathlib.Path, **options) -> str:
    return "\n".join(watch.describe(watch.read(epath.Path(run)), **options))


def test_a_snapshot_has_the_numbers_of_the_files(tmp_path, capsys):
    run = make_run(tmp_path)
    assert cli.run(["watch", f"--workdir={run}", "--once"]) == 0
    shown = capsys.readouterr().out
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert shown.startswith("quickstart: finished\n3,412,736 parameters, 1 x cpu\nstep 1000/1000")
    assert f"loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tok/s  lr " in shown
    assert "evaluation at step 1000\n  test: loss 2.3000" in shown and "validation: loss 2.2346" in shown
    assert "  | def main():\n  |     print('hi')" in shown
    assert not [c for c in shown if not c.isprintable() and c != "\n"], "control characters reach the terminal"
    assert HOSTILE not in shown


def test_a_plan_is_shown_beside_what_the_run_measured(tmp_path):
    """Planned: 0.067 s a step; measured: 0.134 s. The longest part has the longest bar."""
    run = make_run(tmp_path, steps=100)
    parts = {"matmuls": 0.04, "elementwise": 0.02, "host copies": 0.0}
    plan = {"topology": "v6e:2x4", "devices": 8, "quick": True, "step_seconds": 0.067, "parts": parts}
    put(run / "plan.json", plan)
    shown = snapshot(run)
    assert "plan: v6e:2x4, 8 devices, quick depth\n" in shown
    assert "seconds of a step: planned 0.067, measured 0.134, 2.00 x\n" in shown
    assert f"matmuls                 0.040 s  {'█' * 30}\n" in shown
    assert f"elementwise             0.020 s  {'█' * 15}\n" in shown and "host copies" not in shown


def test_the_lock_determines_the_state_of_a_run(tmp_path):
    run = make_run(tmp_path, steps=100)
    put(run / "config.json", {"train": {"steps": 200, "stop_at": 150}})
    assert snapshot(run).startswith("quickstart: not running, stopped at step 100 of 150\n")
    with workdirs.Lock(run, primary=True):
        shown = snapshot(run)
        assert shown.startswith(f"quickstart: running: process {os.getpid()} on ")
        assert "ETA 0:07" in shown, "50 steps of 0.134 s"
        lock = json.loads((run / "lock.json").read_text())
    put(run / "lock.json", {**lock, "born": "0"})
    assert "ended without releasing the workdir" in snapshot(run) and "ETA" not in snapshot(run)
    put(run / "lock.json", {**lock, "host": "elsewhere", "machine": "other"})
    assert snapshot(run).startswith(f"quickstart: running: process {os.getpid()} on elsewhere\n")
    put(run / "lock.json", {**lock, "host": "elsewhere", "refreshed": lock["refreshed"] - 3600})
    assert "ended without releasing the workdir; it has not written lock.json for 1:00:" in snapshot(run)


def test_a_column_of_the_curve_is_the_mean_of_its_steps():
    rising = watch.draw_curve([(step, float(step)) for step in range(1, 9)], width=19, rows=1)
    assert rising == ["        8 ▁▂▃▄▅▆▇█", "          step 1 8"]
    with_gaps = watch.draw_curve([(1, math.nan), (2, 1.0), (3, math.inf), (4, 3.0)], width=19, rows=2)
    assert [line[:9].strip() for line in with_gaps] == ["3", "1", ""]
    assert watch.draw_curve([(1, math.nan)]) == ["no finite value"]
    assert watch.draw_curve([(7, 2.0)], width=19, rows=1)[0].split() == ["2", "▁" * 8]


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1}],
        [{"step": 1, "loss": "x", "step_seconds": None, "tokens_per_second": []}],
        [{"step": 0, "loss": math.nan, "learning_rate": math.inf, "step_seconds": math.nan}],
        [{"step": 10**12, "loss": 3e38}, {"step": 10**12 + 1, "loss": -3e38}],
    ],
)
@pytest.mark.parametrize("width", [1, 80])
def test_odd_files_are_handled(tmp_path, lines, width):
    put(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    put(tmp_path / "config.json", {"train": {"steps": "many"}})
    put(tmp_path / "run.json", {"parameters": "all", "device": 3})
    put(tmp_path / "samples.json", [1, {"text": "a long line " * 50}, {}])
    put(tmp_path / "eval/5/validation.json", {"total": {"loss": None, "accuracy": 0.5}})
    shown = snapshot(tmp_path, width=width)
    assert f"step {lines[-1]['step']}" in shown and "validation: accuracy 50.00%" in shown


def test_a_missing_folder_or_log_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        cli.run(["watch", f"--workdir={tmp_path / 'none'}"])
    for flags in ([], ["--once"]):
        with pytest.raises(UserError, match="no step was logged"):
            cli.run(["watch", f"--workdir={tmp_path}", *flags])
    put(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    put(tmp_path / "samples.json", "{")
    with pytest.raises(UserError, match=r"samples\.json: not JSON"):
        cli.run(["watch", f"--workdir={tmp_path}", "--once"])


def test_watch_does_not_import_jax(tmp_path):
    put(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    code = f"import sys; from llmjax.cli import main; main.run(['watch', '--workdir={tmp_path}', '--once']); "
    out = jobs.run([sys.executable, "-c", code + "print('jax' in sys.modules)"])
    assert out.splitlines()[-1] == "False"


def test_a_pipe_receives_a_snapshot_for_each_new_step(tmp_path):
    put(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    arguments = [str(jobs.LLMJAX), "watch", f"--workdir={tmp_path}", "--every=1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=jobs.environment()) as process:
        assert process.stdout
        for step in (1, 2):
            while f"step {step}/{step}  loss 2.000".encode() not in process.stdout.readline():
                assert process.poll() is None
            put(tmp_path / "metrics.jsonl", f'{{"step": {step + 1}, "loss": 2.0}}\n')
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


def test_a_terminal_is_redrawn_and_keeps_the_last_view(tmp_path):
    put(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    main, terminal = os.openpty()
    arguments = [str(jobs.LLMJAX), "watch", f"--workdir={tmp_path}"]
    process = subprocess.Popen(arguments, stdout=terminal, env=jobs.environment(TERM="xterm"))
    os.close(terminal)
    shown = b""
    while b"Ctrl-C to leave" not in shown:
        shown += os.read(main, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while more := os.read(main, 4096):
            shown += more
    except OSError:  # the process closed its end
        pass
    os.close(main)
    assert process.wait(timeout=60) == 0
    assert b"\x1b[?1049h" in shown, "the view is on the alternate screen"
    assert b"step 1/1  loss 2.000" in shown.split(b"\x1b[?1049l")[1]
