"""Preemption notices of Google Compute Engine, from a stand-in for its metadata server on loopback."""

from collections.abc import Iterator
import http.server
import signal
import subprocess
import threading

import pytest

from llmjax.errors import UserError
from llmjax.train.cloud_notice import CloudNotice, check_notice
from tests import jobs


class MetadataServer(http.server.ThreadingHTTPServer):
    """Answers as the documentation of the metadata server says; `values` and `broken` are set by tests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.broken = False
        self.answered = threading.Semaphore(0)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, MetadataServer)
        folder, _, key = self.path.rpartition("/")
        allowed = self.headers["Metadata-Flavor"] == "Google" and folder == "/computeMetadata/v1/instance"
        self.send_response(503 if server.broken else 200 if allowed else 403)
        self.end_headers()
        self.wfile.write(server.values[key].encode())
        server.answered.release()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def server(monkeypatch) -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # is not used: nothing listens there
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def stop_requests() -> Iterator[threading.Semaphore]:
    requests = threading.Semaphore(0)
    old = signal.signal(signal.SIGTERM, lambda *_: requests.release())
    yield requests
    signal.signal(signal.SIGTERM, old)


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_requests_one_stop(server, stop_requests, capsys, key, value):
    with CloudNotice("gce", poll_seconds=0.01):
        for _ in range(8):
            assert server.answered.acquire(timeout=60)
        assert not stop_requests.acquire(blocking=False)
        server.values[key] = value
        assert stop_requests.acquire(timeout=60)
    assert f"Google Compute Engine will stop this machine ({key}: {value}): saving" in capsys.readouterr().out


def test_a_live_migration_is_no_reason_to_stop(server, stop_requests):
    server.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    with CloudNotice("gce", poll_seconds=0.01):
        for _ in range(8):
            assert server.answered.acquire(timeout=60)
    assert not stop_requests.acquire(blocking=False)


def test_a_server_that_fails_is_asked_again_and_named_once(server, stop_requests, capsys):
    with CloudNotice("gce", poll_seconds=0.01):
        server.broken = True
        for _ in range(8):
            assert server.answered.acquire(timeout=60)
        server.broken, server.values["preempted"] = False, "TRUE"
        assert stop_requests.acquire(timeout=60)
    assert capsys.readouterr().out.count("does not answer (HTTP Error 503") == 1


def test_without_a_metadata_server_the_option_is_refused(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"train.preemption_notice='gce': the metadata server 127.0.0.1:1 does not"):
        CloudNotice("gce").__enter__()


def test_nobody_is_asked_by_default(server):
    with CloudNotice(""):
        assert not server.answered.acquire(timeout=0.1)


def test_an_unknown_cloud_is_refused():
    with pytest.raises(UserError, match=r"train.preemption_notice='moon': expected 'gce' or ''"):
        check_notice("moon")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_notice_to_a_job_saves_a_checkpoint(server, tmp_path, monkeypatch):
    monkeypatch.delenv("http_proxy")  # gRPC would use it between the processes
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus"), tmp_path / "run"
    changes = {"train__steps": 1000000, "data__at_source_end": "repeat", "checkpoint__every": 1000000}
    arguments = jobs.command("train", workdir, corpus, **changes, train__preemption_notice="gce")
    with subprocess.Popen(
        jobs.launch(arguments, 2, 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=jobs.environment(),
    ) as job:
        assert job.stdout
        for line in job.stdout:
            if "loss" in line:
                server.values["preempted"] = "TRUE"
                break
        printed = job.stdout.read()
    assert job.returncode == 85, printed
    assert "will stop this machine (preempted: TRUE): saving" in printed and "stop requested: step" in printed
    assert len(jobs.checkpoints(workdir)) == 1
