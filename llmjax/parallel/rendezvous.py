"""The processes of a job meet at the coordinator's address before JAX starts, so that a missing one is named in a line.

JAX itself ends a process with a page of C++ frames, or with SIGSEGV, where the port is taken or a process is missing.
Process 0 listens at the port, greets each of the others, and lets all of them go on when all have come. JAX then opens
the same port. The messages are lines of text: "llmjax" from process 0, "process 3 of 8" from a process, and then "go",
"missing REASON" or "refused REASON".
"""

import contextlib
import errno
import logging
import re
import selectors
import socket
import time

from llmjax.errors import UserError
from llmjax.parallel.cluster import Job, is_loopback, split_address

logger = logging.getLogger(__name__)

_GREETING = "llmjax"
_GREETING_SECONDS = 10.0  # process 0 greets at once; what does not is another program
_PORT_SECONDS = 10.0  # how long a previous job may take to release the port
_REPORT_SECONDS = 30.0
_PAUSE_SECONDS = 0.2
_MAX_LINE = 4096  # bytes


def meet(job: Job, seconds: float, bind_address: str) -> None:
    """Return when all processes of the job have come to its coordinator.

    bind_address    host:port at which process 0 listens

    Raises TimeoutError that names the missing processes, on all processes that have come, after `seconds`; or what is
    wrong with the address. Raises UserError where the address cannot be used, and where another process of the job has
    the same index or another number of processes.
    """
    if job.process_id == 0:
        _Host(job, seconds).gather(bind_address)
    else:
        _come(job, seconds)


class _Host:
    """Process 0: waits for all others."""

    def __init__(self, job: Job, seconds: float):
        self._job, self._seconds = job, seconds
        self._arrived: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()

    def gather(self, bind_address: str) -> None:
        """Wait until all processes have come, then let them go on."""
        deadline, report = time.monotonic() + self._seconds, time.monotonic() + _REPORT_SECONDS
        with _listen(bind_address, min(self._seconds, _PORT_SECONDS)) as server:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            while len(self._arrived) < self._job.num_processes - 1:
                if time.monotonic() > deadline:
                    raise self._give_up()
                if time.monotonic() > report:
                    report += _REPORT_SECONDS
                    logger.info("waiting for process %s of %d", self._missing(), self._job.num_processes)
                for key, _ in self._selector.select(timeout=1):
                    if key.fileobj is server:
                        self._greet(server)
                    else:
                        self._read(key.fileobj)  # type: ignore[arg-type]
        self._release()

    def _missing(self) -> str:
        missing = sorted(set(range(1, self._job.num_processes)) - self._arrived.keys())
        shown = ", ".join(map(str, missing[:8]))
        return f"{shown} and {len(missing) - 8} more" if len(missing) > 8 else shown

    def _greet(self, server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
        except OSError:  # it has closed the connection
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)
        _send(connection, _GREETING)

    def _read(self, connection: socket.socket) -> None:
        """Read which process this is, or that it has gone."""
        try:
            text = connection.recv(_MAX_LINE).decode(errors="replace")
        except OSError:
            text = ""
        came = re.fullmatch(r"process (\d{1,9}) of (\d{1,9})\n", text)
        if came:
            index, count = map(int, came.groups())
            if count == self._job.num_processes and 0 < index < count and index not in self._arrived:
                self._arrived[index] = connection
                return
            reason = f"process {index} of {count} came to a job of {self._job.num_processes} processes"
            if index in self._arrived:
                reason = f"process {index} came twice"
            _send(
                connection,
                f"refused {reason} at {self._job.coordinator}: give each job its own port, each process its own id",
            )
        self._arrived = {index: other for index, other in self._arrived.items() if other is not connection}
        self._selector.unregister(connection)
        connection.close()

    def _give_up(self) -> TimeoutError:
        message = (
            f"process {self._missing()} of {self._job.num_processes} did not come to the coordinator "
            f"{self._job.coordinator} within {self._seconds:g} s: check that it was started and that its host can "
            f"reach this address{_loopback_hint(self._job)}"
        )
        for connection in self._arrived.values():
            _send(connection, f"missing {message}")
        return TimeoutError(message)

    def _release(self) -> None:
        """Let the others go on. They close their connections first, so that none holds the port that JAX opens."""
        for connection in self._arrived.values():
            _send(connection, "go")
        for connection in self._arrived.values():
            connection.settimeout(_GREETING_SECONDS)
            with contextlib.suppress(OSError):
                connection.recv(1)
            connection.close()
        self._selector.close()


def _listen(address: str, seconds: float) -> socket.socket:
    """A socket that listens at host:port, when the port becomes free."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    everywhere = host in ("", "::")
    dual = everywhere and socket.has_dualstack_ipv6()
    if everywhere:
        host, family = "", socket.AF_INET6 if dual else socket.AF_INET
    deadline, said = time.monotonic() + seconds, False
    while True:
        try:
            return socket.create_server((host, port), family=family, dualstack_ipv6=dual, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"process 0 cannot listen at {address} ({error.strerror}): set the coordinator to an address of "
                    "this host and a port above 1023"
                ) from error
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"port {port} of this host, for the coordinator, is in use by another program: stop it, or choose "
                    "another port for the job"
                ) from error
        if not said:
            said = True
            logger.info("port %d is in use: waiting %g s for it", port, seconds)
        time.sleep(_PAUSE_SECONDS)


def _come(job: Job, seconds: float) -> None:
    """A process other than 0: say that it has come, and wait for the others."""
    start = time.monotonic()
    report = start + _REPORT_SECONDS
    while True:
        left = start + seconds - time.monotonic()
        try:
            answer = _ask(job, max(left, 1.0))
            break
        except OSError as error:
            problem = f"could not connect to process 0 at {job.coordinator} within {seconds:g} s ({error})"
        except ValueError as error:
            problem = f"found another program than process 0 of this job at {job.coordinator} ({error})"
        if left < 0:
            raise TimeoutError(
                f"process {job.process_id} {problem}: check that process 0 is running and that this host can reach "
                f"that port{_loopback_hint(job)}"
            )
        if time.monotonic() > report:
            report += _REPORT_SECONDS
            logger.info("process %d %s", job.process_id, problem.replace(f" within {seconds:g} s", " so far"))
        time.sleep(_PAUSE_SECONDS)
    kind, _, reason = answer.partition(" ")
    if kind != "go":
        raise TimeoutError(reason) if kind == "missing" else UserError(reason)


def _ask(job: Job, seconds: float) -> str:
    """What process 0 answers to this process. Raises ValueError where something else listens there."""
    with socket.create_connection(
        split_address(job.coordinator), timeout=min(seconds, _GREETING_SECONDS)
    ) as connection:
        connection.settimeout(_GREETING_SECONDS)
        lines = connection.makefile("rb")
        try:
            greeting = lines.readline(_MAX_LINE)
        except TimeoutError:
            raise ValueError(f"no greeting within {_GREETING_SECONDS:g} s") from None
        if greeting != f"{_GREETING}\n".encode():
            raise ValueError(f"it sent {greeting[:40]!r}")
        _send(connection, f"process {job.process_id} of {job.num_processes}")
        connection.settimeout(seconds + _GREETING_SECONDS)  # process 0 may have started to wait later
        answer = lines.readline(_MAX_LINE).decode(errors="replace").strip()
        if not answer:
            raise ConnectionError("process 0 ended before all processes had come")
        return answer


def _send(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # the other side has gone: the next read tells
        connection.sendall(f"{line}\n".encode())


def _loopback_hint(job: Job) -> str:
    if not is_loopback(split_address(job.coordinator)[0]):
        return ""
    return ". A loopback address works within one host: for several hosts, give the address of process 0's host"
