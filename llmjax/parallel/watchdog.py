"""A watchdog ends a job in which a process is stuck or dead, and says which one, in which phase, since when.

Each process reports its phase once a second. Process 0 watches all processes, the others watch process 0. When one is
stuck, every process prints who, its own stacks, and ends with exit status 75.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import threading
import time
from typing import NoReturn

import jax

from llmjax.parallel import hosts, primary_link
from llmjax.parallel.phases import SILENT_SECONDS, Observer, PhaseTimer, Report, WatchdogConfig

HANG = 75  # exit status
# Folders of published texts. That of process 0 has a folder of its own, which all others read.
_REPORTS, _PRIMARY, _VERDICT, _PORT = (f"watchdog/{name}" for name in ("reports", "primary", "verdict", "port"))
_TICK_SECONDS = 1.0
_REPORTS_PER_SECOND = 100  # of all processes together, which process 0 serves
# Of the time without a heartbeat: JAX sends two in that time, so it may abort the others (134) after half of it.
_DEAD_SHARE = 0.4
_SLOW_LOG_SECONDS = 600.0  # between two lines about the same slow process
_PEER_FAILED_SECONDS = 2.0  # the main thread usually meets the failure of another process, and ends by itself


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why the job ends: the exit status of all processes, the process that said so, and one line."""

    status: int
    process: int
    line: str


class Watchdog:
    """Watches the processes of a job from `with` on; a thread of its own reports, and the step loop only sets fields.

    config         limits of the phases
    save_seconds   limit of saving and restoring (checkpoint.timeout_seconds)
    """

    def __init__(self, config: WatchdogConfig, save_seconds: int):
        self._timer = PhaseTimer(config, save_seconds)
        self._process, self._count = jax.process_index(), jax.process_count()
        self._period = max(_TICK_SECONDS, self._count / _REPORTS_PER_SECOND)
        watched = list(range(self._count)) if self._process == 0 else [0]
        self._silent_seconds = max(SILENT_SECONDS, 10 * self._period)
        self._observer = Observer(watched, self._silent_seconds, _DEAD_SHARE * hosts.heartbeat_seconds())
        self._key = f"{_PRIMARY if self._process == 0 else _REPORTS}/{self._process}"
        self._report = Report()
        self._others: dict[int, Report] = {}
        self._verdict: Verdict | None = None
        self._closed, self._ending, self._end_lock = threading.Event(), threading.Event(), threading.Lock()
        self._slow_logged: dict[int, float] = {}
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self._count > 1:
            self._threads.append(threading.Thread(target=self._exchange_reports, name="watchdog reports", daemon=True))
        self._link: socket.socket | None = None  # to process 0

    def enter(self, phase: str, step: int) -> None:
        """This process begins a phase of PHASES, or begins it again."""
        self._timer.enter(phase, step)

    def forget_steps(self) -> None:
        """Later steps may take another time than those before."""
        self._timer.forget_steps()

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        if self._count > 1 and self._process == 0:
            with contextlib.suppress(OSError):
                links = primary_link.Links(hosts.coordinator_host(), self._count)
                arguments = {"target": links.watch, "args": [self._check_ended], "name": "watchdog links"}
                threading.Thread(**arguments, daemon=True).start()
                hosts.publish(f"{_PORT}/0", str(links.port))
        elif self._count > 1:
            threading.Thread(target=self._watch_link, name="watchdog link", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Stop watching. After an error of a collective, first name the process that died and end, if one did."""
        if isinstance(error, jax.errors.JaxRuntimeError) and self._count > 1:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
                self._explain()
        while self._ending.is_set():  # the thread ends this process
            time.sleep(1)
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._period)
        if error is None and self._count > 1:
            # Process 0 may need longer for the report, and must not take this process for dead.
            last = dataclasses.replace(self._report, phase="done", limit=0, beat=self._report.beat + 1)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                hosts.publish(self._key, last.to_json())
            if self._link:  # after an error it closes with this process, which first tells the others why it ends
                with contextlib.suppress(OSError):
                    self._link.shutdown(socket.SHUT_RDWR)  # wakes its thread

    def _explain(self) -> None:
        """End with a line about the process whose end broke a collective; return where there is none."""
        observer, began, last = Observer(list(range(self._count)), self._silent_seconds), time.monotonic(), None
        while time.monotonic() - began < self._silent_seconds / 2 and not self._ending.is_set():
            if self._verdict and self._verdict.status != HANG:
                return _print_line(self._verdict.line)
            now = time.monotonic()
            observer.update(_read_reports(_REPORTS) | _read_reports(_PRIMARY), now - (last or now))
            last = now
            if quiet := observer.quiet():
                line = f"a collective failed; {_describe(observer, quiet)}"
                self._end(Verdict(HANG, self._process, line), dead=len(quiet), shows_stacks=False)
            time.sleep(0.1)
        if not self._ending.is_set():
            _print_line("a collective failed, but all processes still report: the network may have failed")

    def _exchange_reports(self) -> None:
        """Publish this process's report and read those of others, in a loop that waits while process 0 is stopped."""
        while not self._closed.wait(self._period):
            try:
                hosts.publish(self._key, self._report.to_json())
                self._others = _read_reports(_REPORTS if self._process == 0 else _PRIMARY)
                verdict = hosts.published(_VERDICT)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone: its silence is noticed
            if verdict:
                self._verdict = Verdict(**json.loads(verdict["first"]))

    def _watch_link(self) -> None:
        """End this process when process 0 has ended without a word: JAX will abort it within a millisecond."""
        port: dict[str, str] = {}
        with contextlib.suppress(jax.errors.JaxRuntimeError, OSError):
            while not (port := hosts.published(_PORT)):
                if self._closed.wait(self._period):
                    return
            self._link = primary_link.connect(hosts.coordinator_host(), int(port["0"]), self._process)
        if not self._link:
            return  # no early word then: process 0 may be behind a firewall
        primary_link.wait_until_closed(self._link)
        if not self._closed.is_set() and not self._ending.is_set() and not self._observer.is_done(0):
            self._ending.set()
            _print_line(self._verdict.line if self._verdict else self._observer.describe_ended(0))
            os._exit(self._verdict.status if self._verdict else HANG)

    def _check_ended(self, process: int) -> None:
        """End process 0 if another process, whose connection has closed, ended without a word."""
        began = time.monotonic()
        while not self._closed.is_set() and not self._ending.is_set():
            with contextlib.suppress(RuntimeError):  # this process is leaving the job
                report = _read_reports(_REPORTS).get(process)
                if (report and report.phase == "done") or hosts.published(_VERDICT):
                    return  # a thread follows the verdict
            if time.monotonic() - began > _PEER_FAILED_SECONDS:
                line = self._observer.describe_ended(process)
                self._end(Verdict(HANG, self._process, line), dead=1, shows_stacks=False)
            time.sleep(0.1)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_TICK_SECONDS):
            now = time.monotonic()
            # A longer pause means that this process was suspended, or the machine is overloaded: neither counts.
            seconds, last = min(now - last, 2 * _TICK_SECONDS), now
            self._report = self._timer.tick(seconds)
            self._observer.update({**self._others, self._process: self._report}, seconds)
            if self._verdict and self._verdict.process != self._process:
                self._follow(self._verdict)
            for process in self._observer.newly_silent():
                _print_line(self._observer.describe(process))
            self._log_slow(now)
            # A process with a running watchdog is watched by process 0, or by itself if it is process 0.
            if stuck := self._observer.stuck() if self._process == 0 else self._observer.lost():
                self._decide(stuck)

    def _log_slow(self, now: float) -> None:
        for process in self._observer.slow() if self._process == 0 else []:
            if now - self._slow_logged.get(process, -_SLOW_LOG_SECONDS) >= _SLOW_LOG_SECONDS:
                self._slow_logged[process] = now
                share = self._observer.data_share(process)
                _print_line(
                    f"process {process} is slow: it waits for data {share:.0%} of its time, so the others wait for it"
                )

    def _decide(self, stuck: list[int]) -> None:
        self._end(Verdict(HANG, self._process, _describe(self._observer, stuck)))

    def _follow(self, verdict: Verdict) -> None:
        """End as another process decided. If that process failed, this one gets some time to fail by itself."""
        if verdict.status != HANG and self._closed.wait(_PEER_FAILED_SECONDS):
            return
        self._end(verdict)

    def _end(self, verdict: Verdict, *, dead: int = 0, shows_stacks: bool = True) -> NoReturn:
        with self._end_lock:
            if self._ending.is_set():  # another thread ends this process
                threading.Event().wait()
            self._ending.set()
        # Printing may block, and so does announcing while process 0 is stopped.
        threading.Timer(2 * hosts.END_SECONDS, os._exit, [verdict.status]).start()
        _print_line(verdict.line)
        if verdict.status == HANG and shows_stacks:
            faulthandler.dump_traceback(2)
        _announce(verdict, dead)
        os._exit(verdict.status)


def _describe(observer: Observer, stuck: list[int]) -> str:
    """What the stuck processes are doing, and meanwhile the others."""
    others = observer.describe_others(stuck)
    return "; ".join(map(observer.describe, stuck)) + (f" (meanwhile {others})" if others else "")


def _read_reports(folder: str) -> dict[int, Report]:
    return {int(name): Report.from_json(text) for name, text in hosts.published(folder).items()}


def announce_failure(status: int, reason: str) -> None:
    """Tell the other processes that this one ends with an error; they end with the same status if it ends them."""
    process = jax.process_index()
    line = f"process {process} ended with exit status {status}: {' '.join(reason.split())[:400]}"
    _announce(Verdict(status, process, line))


def _announce(verdict: Verdict, dead: int = 0) -> None:
    """Tell the other processes why this one ends. Process 0 waits some seconds until they end as well."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if jax.process_index() == verdict.process:
            hosts.publish(f"{_VERDICT}/first", json.dumps(dataclasses.asdict(verdict)), overwrite=False)
    hosts.announce_end(verdict.status, dead)


def _print_line(text: str) -> None:
    """Print to stderr without locks: the main thread may hold those of its streams."""
    with contextlib.suppress(OSError):
        os.write(2, f"llmjax: watchdog: {text}\n".encode())
