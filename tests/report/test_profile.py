"""The operations of a profiler trace in the report."""

import gzip
import json
import pathlib
import re

from etils import epath
import pytest

from llmjax.report import write_report
from llmjax.report.profile import read_profile
from tests.report.runs import make_run


def trace_event(name: str, ts: float, dur: float, tid: int = 1, pid: int = 1, **args) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "ts": ts, "dur": dur, "name": name, "args": args}


def put_trace(run: pathlib.Path, events: list, time: str = "2026_01_01_00_00_00") -> pathlib.Path:
    path = run / "profile/plugins/profile" / time / "host.trace.json.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_operation_times_exclude_nested_operations(tmp_path):
    """A loop of 100 us with a body of 70 us, and concurrent events of the host and of another thread."""
    run = make_run(tmp_path, steps=10)
    put_trace(run, [trace_event("old", 0, 5, hlo_op="old")], time="2025_12_31_00_00_00")
    loop = [trace_event("while.1", 10, 100, hlo_op="while.1"), trace_event("body <b>", 20, 30, hlo_op="body <b>")]
    loop += [trace_event("body <b>", 60, 40, hlo_op="body <b>"), trace_event("inner", 65, 10, hlo_op="inner")]
    other = [trace_event("dot.2", 15, 900, tid=2, hlo_op="dot.2"), trace_event("PjitFunction", 0, 5000)]
    put_trace(run, [*loop, *other, {}])
    operations = [(op.name, round(op.seconds * 1e6), op.count) for op in read_profile(epath.Path(run)).operations]
    assert operations == [("dot.2", 900, 1), ("body <b>", 60, 2), ("while.1", 30, 1), ("inner", 10, 1)]
    page = write_report(run).read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.split("<h2>Profile</h2>")[1].split("</table>")[0])
    assert cells[4:8] == ["body &lt;b&gt;", "0.060", "6.0%", "2"]


def test_operations_of_an_accelerator_count_once(tmp_path):
    """They are on the line "XLA Ops", and again on the line of a stream."""
    lines = [(1, "XLA Ops"), (2, "Stream #7")]
    events = [{"ph": "M", "pid": 3, "tid": tid, "name": "thread_name", "args": {"name": name}} for tid, name in lines]
    events += [trace_event("fusion.1", 0, 50, tid=tid, pid=3, hlo_op="fusion.1") for tid, _ in lines]
    put_trace(tmp_path, events)
    (operation,) = read_profile(epath.Path(tmp_path)).operations
    assert (operation.name, operation.count) == ("fusion.1", 1)


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"[]"), gzip.compress(b'{"traceEvents": [1]}')],
    ids=["empty", "not gzip", "not an object", "not an event"],  # gzip data contain the time, which differs by process
)
def test_the_report_names_a_damaged_profile(tmp_path, content):
    run = make_run(tmp_path, steps=10)
    put_trace(run, []).write_bytes(content)
    page = write_report(run).read_text()
    assert "<h2>Profile</h2>" not in page and f"Not readable: {run / 'profile'}" in page
