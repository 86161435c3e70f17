"""--coordinator, --num_processes and --process_id: a job by flags, and what is printed where it cannot start."""

import os
import socket
import subprocess

import pytest

from llmjax.cli.flags import JOB_FLAGS, make_parser, parse
from tests import jobs


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in JOB_FLAGS.values():  # set first, so that monkeypatch also removes what the flags set
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def test_flags_take_precedence_over_their_variables(monkeypatch):
    monkeypatch.setenv("LLMJAX_PROCESS_ID", "3")
    monkeypatch.setenv("LLMJAX_NUM_PROCESSES", "4")
    parse(make_parser("eval", "", "", job=True), ["--coordinator=host:1", "--num_processes=8"])
    assert {name: os.environ[name] for name in JOB_FLAGS.values()} == {
        "LLMJAX_COORDINATOR": "host:1",
        "LLMJAX_NUM_PROCESSES": "8",
        "LLMJAX_PROCESS_ID": "3",
    }


@pytest.mark.multiprocess
def test_a_job_by_flags_starts_or_names_what_is_missing(tmp_path):
    """A process alone ends with one line, and two of them form a job."""
    workdir, corpus = tmp_path / "run", jobs.write_corpus(tmp_path / "corpus")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    train = [
        *jobs.command("train", workdir, corpus, train__steps=1, optimizer__warmup_steps=1),
        f"--coordinator={coordinator}",
    ]
    job = [*train, "--num_processes=2"]
    printed = jobs.run([*job, "--process_id=1"], status=75, LLMJAX_INIT_SECONDS="1")
    assert printed.startswith("llmjax: error: process 1 could not connect to process 0") and printed.count("\n") == 1
    printed = jobs.run([*job, "--process_id=0"], status=75, LLMJAX_INIT_SECONDS="1")
    assert printed.startswith("llmjax: error: process 1 of 2 did not come") and printed.count("\n") == 1
    printed = jobs.run(train, status=78)
    assert "LLMJAX_PROCESS_ID (--process_id) belong together" in printed and printed.count("\n") == 1
    # Two processes meet; then the config is refused, which saves the time of training.
    with subprocess.Popen([*job, "--process_id=1"], env=jobs.environment(), stderr=subprocess.PIPE, text=True) as other:
        printed = jobs.run([*job, "--process_id=0"], status=78)
        assert f"job of 2 processes: LLMJAX_* variables, coordinator {coordinator}\n" in printed
        assert "optimizer.warmup_steps=1" in printed and "optimizer.warmup_steps=1" in other.communicate()[1]
    assert other.returncode == 78
