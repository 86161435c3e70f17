"""Processes of one job: starting, agreeing, waiting with a limit, and which rows each one brings."""

import json
import os
import pathlib
import subprocess
import sys

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.parallel import hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOB = ("LLMJAX_COORDINATOR", "LLMJAX_NUM_PROCESSES", "LLMJAX_PROCESS_ID", "LLMJAX_DISTRIBUTED", "LLMJAX_CPU_DEVICES")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in JOB:
        monkeypatch.delenv(name, raising=False)


def launch(processes: int, devices: int, worker: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "launch" / "local.py", f"--processes={processes}", f"--devices={devices}"]
    command += ["--", sys.executable, ROOT / "tests" / worker, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(map(str, command), capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("processes", "devices", "status"), [(2, 2, 77), (4, 1, 0)])
def test_a_job_of_several_processes(tmp_path, processes, devices, status):
    """What each process saw; `status` is that with which process 1 ends."""
    done = launch(processes, devices, "parallel/hosts_worker.py", tmp_path, status)
    assert done.returncode == status, done.stdout
    seen = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(processes)]
    tokens = np.arange(32).reshape(8, 4)
    for process, one in enumerate(seen):
        assert one["devices"] == [devices, processes * devices]
        assert one["primary"] == (process == 0)
        assert one["exchange"] == [[f"text {other} {turn}" for other in range(processes)] for turn in range(3)]
        assert one["broadcast"] == "from 0"
        assert one["agree"] == [True, False, False]
        assert one["same"] is None
        assert one["different"].startswith("UserError: token store on process 1 differs from process 0")
        assert one["late"] == (
            "slept" if process == 1 else "TimeoutError: process 1 did not reach 'barrier/lunch' within 1 s"
        )
        assert {feed["sum"] for feed in one["feed"]} == {int((tokens * np.arange(1, 9)[:, None]).sum())}
        assert all(feed["shape"] == [8, 4] for feed in one["feed"])
    # Rows follow the devices that hold them: processes that share a data shard bring the same rows.
    for feed, data in enumerate((1, 2, 4)):
        holds = 8 // data
        for process, one in enumerate(seen):
            first = process * data // processes * holds
            assert one["feed"][feed]["rows"] == list(range(first, first + max(holds, 8 // processes)))


@pytest.mark.multiprocess
def test_a_job_that_does_not_assemble_says_so():
    """Process 1 of 2 with nobody at the coordinator's address."""
    code = "from llmjax.parallel import hosts; hosts.initialize()"
    place = {"LLMJAX_COORDINATOR": "127.0.0.1:1", "LLMJAX_NUM_PROCESSES": "2", "LLMJAX_PROCESS_ID": "1"}
    environment = {**os.environ, **place, "LLMJAX_INIT_SECONDS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0
    assert "TimeoutError: process 1 found nobody at LLMJAX_COORDINATOR=127.0.0.1:1 within 2 s" in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LLMJAX_COORDINATOR": "h:1"}, "belong together: set all three"),
        ({"LLMJAX_NUM_PROCESSES": "2", "LLMJAX_PROCESS_ID": "0"}, "belong together: set all three"),
        ({"LLMJAX_NUM_PROCESSES": "two"}, "LLMJAX_NUM_PROCESSES='two': expected an integer, 1 or more"),
        ({"LLMJAX_PROCESS_ID": "-1"}, "LLMJAX_PROCESS_ID='-1': expected an integer, 0 or more"),
        ({"LLMJAX_DISTRIBUTED": "yes"}, "set it to 'auto', or unset it"),
        ({"LLMJAX_COORDINATOR": "h", "LLMJAX_NUM_PROCESSES": "2", "LLMJAX_PROCESS_ID": "1"}, "'h': expected host:port"),
        ({"LLMJAX_COORDINATOR": "h", "LLMJAX_NUM_PROCESSES": "2", "LLMJAX_PROCESS_ID": "0"}, "'h': expected host:port"),
        (
            {"LLMJAX_COORDINATOR": "h:1", "LLMJAX_NUM_PROCESSES": "2", "LLMJAX_PROCESS_ID": "2"},
            "LLMJAX_PROCESS_ID=2: must be below LLMJAX_NUM_PROCESSES=2",
        ),
    ],
)
def test_a_wrong_environment_is_told(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        hosts.initialize()


def test_a_cluster_that_is_not_there_is_told():
    code = "from llmjax.parallel import hosts; hosts.initialize()"
    environment = {**os.environ, "LLMJAX_DISTRIBUTED": "auto", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert "UserError: LLMJAX_DISTRIBUTED=auto, but JAX finds no Slurm, GKE or TPU job here" in done.stderr


@pytest.mark.parametrize("platform", ["moon", "cuda"])
def test_a_platform_that_is_not_there_is_told(platform):
    code = "from llmjax.parallel import hosts; hosts.initialize()"
    environment = {**os.environ, "JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    if platform == "cuda" and not done.returncode:
        pytest.skip("it is there")
    assert f"UserError: JAX_PLATFORMS='{platform}': this installation has no such devices" in done.stderr


def test_fewer_threads_than_devices_are_refused():
    code = "from llmjax.parallel import hosts; hosts.initialize(cpu_threads=2)"
    environment = {**os.environ, "LLMJAX_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert "UserError: parallel.cpu_threads=2: XLA takes a thread for each of the 4 CPU devices" in done.stderr


def test_one_process_agrees_with_itself():
    hosts.initialize()
    assert hosts.exchange("name", "text") == ["text"]
    assert [hosts.agree(value) for value in (True, False)] == [True, False]
    assert hosts.broadcast("name", "text") == "text"
    hosts.all_equal("name", "text")
    hosts.barrier("name", timeout_seconds=0.001)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4), (1, 1, 8)])
def test_a_global_batch_holds_every_row_where_it_belongs(shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    rows = hosts.local_rows(sharding, 8)
    assert rows.tolist() == list(range(8))
    rng = np.random.default_rng(0)
    fields = {name: rng.integers(0, 99, (8, 16), np.int32) for name in ("inputs", "targets", "segments", "positions")}
    local = Batch(**fields, weights=rng.random((8, 16), np.float32), sample=rng.integers(0, 99, (8, 2), np.uint32))
    batch = hosts.global_batch(sharding, local, rows, 8)
    for name in ("inputs", "targets", "weights", "segments", "positions", "sample"):
        placed, given = getattr(batch, name), getattr(local, name)
        assert placed.sharding == sharding
        assert placed.dtype == given.dtype
        np.testing.assert_array_equal(placed, given)
