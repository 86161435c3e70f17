"""Jobs of several processes: start, agreement, barriers with a time limit, and the rows of each process."""

import json
import os
import pathlib
import socket
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
JOB_VARIABLES = (
    "LLMJAX_COORDINATOR",
    "LLMJAX_NUM_PROCESSES",
    "LLMJAX_PROCESS_ID",
    "LLMJAX_DISTRIBUTED",
    "LLMJAX_CPU_DEVICES",
)


@pytest.fixture(autouse=True)
def without_job_variables(monkeypatch):
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def launch(processes: int, devices: int, worker: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "launch" / "local.py", f"--processes={processes}", f"--devices={devices}"]
    command += ["--", sys.executable, ROOT / "tests" / worker, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(map(str, command), capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("processes", "devices", "status"), [(2, 2, 77), (4, 1, 0)])
def test_a_job_of_several_processes(tmp_path, processes, devices, status):
    """Every process writes a report. `status` is the exit status of process 1."""
    job = launch(processes, devices, "parallel/hosts_worker.py", tmp_path, status)
    assert job.returncode == status, job.stdout
    reports = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(processes)]
    tokens = np.arange(32).reshape(8, 4)
    for process, report in enumerate(reports):
        assert report["devices"] == [devices, processes * devices]
        assert report["primary"] == (process == 0)
        assert report["exchange"] == [[f"text {other} {turn}" for other in range(processes)] for turn in range(3)]
        assert report["broadcast"] == "from 0"
        assert report["agree"] == [True, False, False]
        assert report["same"] is None
        assert report["different"].startswith("UserError: token store on process 1 differs from process 0")
        timeout = "TimeoutError: process 1 did not reach 'barrier/late' within 1 s"
        assert report["late"] == ("slept" if process == 1 else timeout)
        assert {batch["sum"] for batch in report["batches"]} == {int((tokens * np.arange(1, 9)[:, None]).sum())}
        assert all(batch["shape"] == [8, 4] for batch in report["batches"])
    # A process has the rows of its devices, so processes that share a data shard have the same rows.
    for index, data in enumerate((1, 2, 4)):
        shard_rows = 8 // data
        for process, report in enumerate(reports):
            first = process * data // processes * shard_rows
            expected = list(range(first, first + max(shard_rows, 8 // processes)))
            assert report["batches"][index]["rows"] == expected


def initialize_in_process(arguments: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Run hosts.initialize(ARGUMENTS) in a process of its own with these environment variables."""
    log = "import logging; logging.basicConfig(level=20)"
    code = f"{log}; from llmjax.parallel import hosts; hosts.initialize({arguments})"
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.multiprocess
@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_does_not_come_is_named(present):
    """One process of a job of two, whose other process is never started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = initialize_in_process(
        LLMJAX_COORDINATOR=address, LLMJAX_NUM_PROCESSES="2", LLMJAX_PROCESS_ID=str(present), LLMJAX_INIT_SECONDS="1"
    )
    assert process.returncode != 0
    messages = (
        f"TimeoutError: process 1 of 2 did not come to the coordinator {address} within 1 s",
        f"TimeoutError: process 1 could not connect to process 0 at {address} within 1 s",
    )
    assert messages[present] in process.stderr


def test_bad_environment_variables_are_refused(monkeypatch):
    monkeypatch.setenv("LLMJAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="LLMJAX_NUM_PROCESSES='two': expected an integer, 1 or more"):
        hosts.initialize()


def test_the_log_says_how_a_job_was_found():
    variables = {"SLURM_JOB_ID": "7", "LLMJAX_CPU_DEVICES": "1"}
    assert "one process: Slurm job 7, not a step of several tasks" in initialize_in_process(**variables).stderr


@pytest.mark.parametrize("platform", ["moon", "cuda"])
def test_a_platform_that_is_not_installed_is_refused(platform):
    process = initialize_in_process(JAX_PLATFORMS=platform)
    if platform == "cuda" and not process.returncode:
        pytest.skip("CUDA is installed")
    assert f"UserError: JAX_PLATFORMS='{platform}': this installation has no such devices" in process.stderr


def test_fewer_threads_than_devices_are_refused():
    process = initialize_in_process("cpu_threads=2", LLMJAX_CPU_DEVICES="4")
    assert "UserError: parallel.cpu_threads=2: XLA takes a thread for each of the 4 CPU devices" in process.stderr


def test_a_job_of_one_process_returns_its_own_values():
    hosts.initialize()
    assert hosts.exchange("name", "text") == ["text"]
    assert [hosts.agree(value) for value in (True, False)] == [True, False]
    assert hosts.broadcast("name", "text") == "text"
    hosts.all_equal("name", "text")
    hosts.barrier("name", timeout_seconds=0.001)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4), (1, 1, 8)])
def test_a_global_batch_has_every_row_in_order(shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    rows = hosts.local_rows(sharding, 8)
    assert rows.tolist() == list(range(8))
    rng = np.random.default_rng(0)
    fields = {name: rng.integers(0, 99, (8, 16), np.int32) for name in ("inputs", "targets", "segments", "positions")}
    local = Batch(**fields, weights=rng.random((8, 16), np.float32), sample=rng.integers(0, 99, (8, 2), np.uint32))
    batch = hosts.global_batch(sharding, local, rows, 8)
    for name in ("inputs", "targets", "weights", "segments", "positions", "sample"):
        field, expected = getattr(batch, name), getattr(local, name)
        assert field.sharding == sharding
        assert field.dtype == expected.dtype
        np.testing.assert_array_equal(field, expected)
