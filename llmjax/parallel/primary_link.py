"""A TCP connection of every process to process 0, whose end tells the other side at once that a process has ended.

JAX notices a dead process by its heartbeat, after a minute or more. It notices a dead process 0 at once, but then it
aborts the others with a page of C++ frames.
"""

from collections.abc import Callable
import contextlib
import selectors
import socket
import struct

from llmjax.parallel.cluster import is_loopback

_CONNECT_SECONDS = 10.0
_KEEPALIVE_SECONDS = 60  # a firewall may forget a connection on which nothing is sent
_MAX_QUEUE = 4096  # Linux keeps no more connections that wait, unless net.core.somaxconn says so
_NUMBER = struct.Struct("!I")  # the first bytes of a connection: which process it is


class Links:
    """The end of process 0: a free port for the connections of the others.

    host    address of process 0 as the others know it
    count   of processes

    Raises OSError where no socket can be opened.
    """

    def __init__(self, host: str, count: int):
        if is_loopback(host):
            family, dual = socket.AF_INET6 if ":" in host else socket.AF_INET, False
        else:
            host, dual = "", socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
        backlog = min(count, _MAX_QUEUE)
        self._server = socket.create_server((host, 0), family=family, dualstack_ipv6=dual, backlog=backlog)
        self._count = count
        self.port = self._server.getsockname()[1]

    def watch(self, on_end: Callable[[int], None]) -> None:
        """Accept connections until this process ends, and call `on_end` with each process whose connection closes."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            processes: dict[socket.socket, int | None] = {}
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._server:
                        connection, _ = self._server.accept()
                        _keep_alive(connection)
                        selector.register(connection, selectors.EVENT_READ)
                        processes[connection] = None
                        continue
                    assert isinstance(key.fileobj, socket.socket)
                    connection = key.fileobj
                    number = _read_number(connection) if processes[connection] is None else None
                    if number is not None and number < self._count:
                        processes[connection] = number
                        continue
                    selector.unregister(connection)
                    connection.close()
                    if (process := processes.pop(connection)) is not None:
                        on_end(process)


def connect(host: str, port: int, process: int) -> socket.socket:
    """A connection of `process` to the Links of process 0. Raises OSError where it can't be reached."""
    connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    _keep_alive(connection)
    connection.sendall(_NUMBER.pack(process))
    connection.settimeout(None)
    return connection


def wait_until_closed(connection: socket.socket) -> None:
    """Return when process 0 has ended, or when this process has called `connection.shutdown`."""
    with contextlib.suppress(OSError):
        connection.recv(1)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)


def _read_number(connection: socket.socket) -> int | None:
    """The number that a process sent; None: it sent something else, or has ended."""
    with contextlib.suppress(OSError):
        # Four bytes of one `sendall` come in one piece.
        if len(data := connection.recv(_NUMBER.size)) == _NUMBER.size:
            return _NUMBER.unpack(data)[0]
    return None
