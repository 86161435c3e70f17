"""The connection to process 0 closes when that process ends, however it ends."""

import subprocess
import sys
import threading

import pytest

from llmjax.parallel import primary_link

PRIMARY = """
import sys, time
from llmjax.parallel import primary_link
print(primary_link.listen("127.0.0.1", 2), flush=True)
sys.stdin.read()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("end", ["killed", "done"])
def test_a_connection_closes_when_process_0_ends(end):
    process = subprocess.Popen(
        [sys.executable, "-c", PRIMARY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline())
        connections = [primary_link.connect("127.0.0.1", port) for _ in range(2)]
        threads = [threading.Thread(target=primary_link.wait_until_closed, args=[c], daemon=True) for c in connections]
        for thread in threads:
            thread.start()
            thread.join(timeout=0.2)
            assert thread.is_alive()  # process 0 lives
        process.kill() if end == "killed" else process.stdin.close()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    finally:
        process.kill()
        process.wait()
    for connection in connections:
        connection.close()
