"""Processes meet at the coordinator's port: complete, incomplete, beside strangers. Threads stand for the processes."""

from concurrent.futures import ThreadPoolExecutor
import socket
import threading

import pytest

from llmjax.errors import UserError
from llmjax.parallel import rendezvous
from llmjax.parallel.cluster import Job

MINUTE = 60.0


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def meet(address: str, count: int, index: int, seconds: float = MINUTE, bind: str = "") -> str:
    """What a process of a job of `count` sees: "met" or its error."""
    try:
        rendezvous.meet(Job("test", address, count, index), seconds, bind or address)
    except (UserError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return "met"


def meet_all(processes: list[tuple]) -> list[str]:
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda arguments: meet(*arguments), processes))


@pytest.mark.parametrize("everywhere", [False, True])
def test_all_processes_meet_and_leave_the_port_free(everywhere):
    address = free_address()
    bind = f"[::]:{address.rpartition(':')[2]}" if everywhere else address
    assert meet_all([(address, 5, index, MINUTE, bind) for index in (3, 0, 4, 1, 2)]) == ["met"] * 5
    rendezvous._listen(bind, 0).close()


def test_all_that_came_name_the_missing_processes():
    address = free_address()
    answers = meet_all([(address, 5, 0, 3), (address, 5, 2), (address, 5, 4)])
    assert len(set(answers)) == 1
    assert answers[0].startswith(
        f"TimeoutError: process 1, 3 of 5 did not come to the coordinator {address} within 3 s"
    )
    assert "give the address of process 0's host" in answers[0]


def test_a_process_that_has_gone_may_come_again():
    address = free_address()
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(meet, address, 3, 0)]
        server = connect(address)
        assert server.makefile("rb").readline() == b"llmjax\n"
        server.sendall(b"process 2 of 3\n")
        server.shutdown(socket.SHUT_WR)  # it ends
        assert server.recv(100) == b""  # process 0 has seen that
        others += [pool.submit(meet, address, 3, index) for index in (1, 2)]
        assert [other.result() for other in others] == ["met"] * 3


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    deadline = threading.Event()
    for _ in range(600):
        try:
            connection = socket.create_connection((host, int(port)), timeout=MINUTE)
        except OSError:
            deadline.wait(0.1)
        else:
            return connection
    raise TimeoutError(address)


@pytest.mark.parametrize(
    ("count", "index", "reason"),
    [(2, 1, "process 1 of 2 came to a job of 3 processes"), (3, 1, "process 1 came twice")],
)
def test_a_process_of_another_job_is_refused(count, index, reason):
    address = free_address()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, address, 3, 0)
        if count == 3:
            other = connect(address)
            other.sendall(b"process 1 of 3\n")
            assert other.recv(100) == b"llmjax\n"
        answer = meet(address, count, index)
        assert answer == f"UserError: {reason} at {address}: give each job its own port, each process its own id"
        if count == 3:
            rest = [pool.submit(meet, address, 3, 2)]
        else:
            rest = [pool.submit(meet, address, 3, number) for number in (1, 2)]
        if count == 3:
            assert other.recv(100) == b"go\n"
            other.close()
        assert [future.result() for future in [first, *rest]] == ["met"] * (1 + len(rest))


def test_noise_at_the_port_changes_nothing():
    address = free_address()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, address, 2, 0)
        silent = connect(address)
        with connect(address) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert browser.makefile("rb").read() == b"llmjax\n"
        assert meet(address, 2, 1) == "met"
        assert first.result() == "met"
        silent.close()


def test_a_port_that_another_program_holds(monkeypatch):
    monkeypatch.setattr(rendezvous, "_GREETING_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = f"127.0.0.1:{stranger.getsockname()[1]}"
        answers = meet_all([(address, 2, 0, 0.3), (address, 2, 1, 0.3)])
    assert answers[0].endswith(
        "for the coordinator, is in use by another program: stop it, or choose another port for the job"
    )
    start = f"TimeoutError: process 1 found another program than process 0 of this job at {address} (no greeting"
    assert answers[1].startswith(start)


def test_a_port_that_becomes_free_is_used():
    stranger = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{stranger.getsockname()[1]}"
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(meet, address, 2, index) for index in (0, 1)]
        stranger.accept()[0].close()  # process 1 has tried
        stranger.close()
        assert [other.result() for other in others] == ["met"] * 2


def test_an_absent_process_0_and_an_address_of_another_host():
    address = free_address()
    answer = meet(address, 2, 1, 0.3)
    assert answer.startswith(f"TimeoutError: process 1 could not connect to process 0 at {address} within 0.3 s")
    assert meet("192.0.2.1:5000", 2, 0, bind="192.0.2.1:5000").startswith(
        "UserError: process 0 cannot listen at 192.0.2.1:5000 (Cannot assign requested address"
    )
