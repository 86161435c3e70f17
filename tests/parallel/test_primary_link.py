"""The connections to process 0 tell both sides when a process ends, however it ends."""

import queue
import socket
import subprocess
import sys
import threading

import pytest

from llmjax.parallel import primary_link

PRIMARY = """
import sys, threading
from llmjax.parallel import primary_link
links = primary_link.Links("127.0.0.1", 3)
threading.Thread(target=links.watch, args=[lambda process: None], daemon=True).start()
print(links.port, flush=True)
sys.stdin.read()
"""
PEER = """
import sys
from llmjax.parallel import primary_link
connection = primary_link.connect("127.0.0.1", int(sys.argv[1]), int(sys.argv[2]))
print("connected", flush=True)
sys.stdin.read()
"""
WAIT_SECONDS = 60


def start(program: str, *arguments: object) -> subprocess.Popen:
    """Start a Python program whose input and output are pipes."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen, how: str) -> None:
    assert process.stdin is not None
    process.kill() if how == "killed" else process.stdin.close()


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["killed", "done"])
def test_a_connection_closes_when_process_0_ends(how):
    with start(PRIMARY) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            connections = [primary_link.connect("127.0.0.1", port, index) for index in (1, 2)]
            threads = [threading.Thread(target=primary_link.wait_until_closed, args=[c]) for c in connections]
            for thread in threads:
                thread.start()
                thread.join(timeout=0.2)
                assert thread.is_alive()  # process 0 lives
            end(process, how)
            for thread in threads:
                thread.join(timeout=WAIT_SECONDS)
                assert not thread.is_alive()
        finally:
            process.kill()
    for connection in connections:
        connection.close()


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["killed", "done"])
def test_process_0_is_told_which_process_has_ended(how):
    """And is not told of those that live, of strangers, or of a number that no process has."""
    ended: queue.Queue[int] = queue.Queue()
    links = primary_link.Links("127.0.0.1", 3)
    threading.Thread(target=links.watch, args=[ended.put], daemon=True).start()
    living = primary_link.connect("127.0.0.1", links.port, 1)
    for stranger in (b"", b"GE", b"GET / HTTP/1.1\r\n"):
        with socket.create_connection(("127.0.0.1", links.port)) as connection:
            connection.sendall(stranger)
    primary_link.connect("127.0.0.1", links.port, 3).close()
    with start(PEER, links.port, 2) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "connected\n"
            assert ended.empty()
            end(process, how)
            assert ended.get(timeout=WAIT_SECONDS) == 2
        finally:
            process.kill()
    assert ended.empty()
    living.close()
    assert ended.get(timeout=WAIT_SECONDS) == 1
