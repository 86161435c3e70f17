"""A TCP connection to process 0, whose end tells the other processes at once that process 0 has ended.

JAX's client learns it from a connection of its own, and aborts the process with a page of C++ frames.
"""

import contextlib
import socket

from llmjax.parallel.cluster import is_loopback

_CONNECT_SECONDS = 10.0
_KEEPALIVE_SECONDS = 60  # a firewall may forget a connection on which nothing is sent
_MAX_QUEUE = 4096  # Linux keeps no more connections, unless net.core.somaxconn says so


_listening: list[socket.socket] = []  # until this process ends: a socket that nothing refers to is closed


def listen(host: str, count: int) -> int:
    """Open a free port of process 0 for `count` connections, until it ends. Returns the port.

    host    address of process 0 as the others know it

    Nobody accepts the connections: the kernel keeps them, and resets them when this process ends, however it ends.
    Raises OSError where no socket can be opened.
    """
    if is_loopback(host):
        family, dual = socket.AF_INET6 if ":" in host else socket.AF_INET, False
    else:
        host, dual = "", socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
    backlog = min(count, _MAX_QUEUE)
    _listening.append(socket.create_server((host, 0), family=family, dualstack_ipv6=dual, backlog=backlog))
    return _listening[-1].getsockname()[1]


def connect(host: str, port: int) -> socket.socket:
    """A connection to `listen` of process 0. Raises OSError where it can't be reached."""
    connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
    connection.settimeout(None)
    return connection


def wait_until_closed(connection: socket.socket) -> None:
    """Return when process 0 has ended, or when this process has called `connection.shutdown`."""
    with contextlib.suppress(OSError):
        connection.recv(1)
