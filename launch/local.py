#!/usr/bin/env python3
"""Run several processes on this machine as one job: for tests, to try a mesh, or one process per accelerator."""

import argparse
import contextlib
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

BAD_INPUT, PREEMPTED = 78, 85  # exit statuses that decide about a restart
STOPPED = (129, 130, 143)  # by SIGHUP, Ctrl-C or SIGTERM outside the training loop
REASONS = (75, 76, BAD_INPUT, PREEMPTED, *STOPPED)  # exit statuses that name a reason

HELP = """\
Runs a command as one job of several processes on this machine:

  launch/local.py --processes=2 --devices=4 -- llmjax train --config=configs/quickstart.py --workdir=runs/two

Every process gets LLMJAX_COORDINATOR, LLMJAX_NUM_PROCESSES and LLMJAX_PROCESS_ID; its lines begin with [p0], [p1], ...
With --devices=M each process emulates M CPU devices (JAX_PLATFORMS=cpu), so that 2 x 4 devices form a mesh of 8.
SIGTERM, SIGHUP and Ctrl-C are sent to all processes as SIGTERM: they save a checkpoint and exit with 85. Processes
that still run after --grace seconds are killed. A second signal kills them at once, and unsaved steps are lost.
When one process fails, the others are stopped too. The exit status is that of the first process that failed with a
reason (75 hang, 76 diverged, 78 bad input, 85 stopped and saved, 143 stopped with nothing to save), else that of the
first process that crashed; 0 when all succeeded.
"""


def main() -> int:
    """Run the job, restart it as --restarts says, and return its exit status."""
    options = parse(sys.argv[1:])
    stop = threading.Event()
    restarts, pause = options.restarts, 1.0
    while True:
        job = Job(options, stop)
        status = job.run()
        if status in (0, BAD_INPUT) or stop.is_set() or restarts == 0:
            return status
        restarts -= 1
        if status != PREEMPTED:
            log(f"exit status {status}: starting again in {pause:g} s, {restarts} restarts left")
            if stop.wait(pause):
                return status
            pause = min(2 * pause, 60.0)
        else:
            log(f"stopped on request: starting again, {restarts} restarts left")


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad flag in one line with status 78, as llmjax does."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        print(f"launch/local.py: error: {message}; see launch/local.py --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with `command` as the list of what every process runs."""
    parser = Parser(
        prog="launch/local.py",
        usage="launch/local.py --processes=N [--devices=M] [options] -- COMMAND ...",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=positive, required=True, metavar="N", help="processes of the job")
    parser.add_argument("--devices", type=positive, metavar="M", help="emulated CPU devices in each process")
    parser.add_argument(
        "--restarts",
        type=count,
        default=0,
        metavar="R",
        help="restart the job up to R times: at once after 85, after a growing pause after a crash, never after 78",
    )
    parser.add_argument(
        "--grace", type=seconds, default=30.0, metavar="S", help="seconds from SIGTERM to SIGKILL (default 30)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every process runs")
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("the command is missing; put it after --, such as: -- llmjax train --config=... --workdir=...")
    options.command[0] = resolve(options.command[0])
    return options


def positive(text: str) -> int:
    """The type of a flag: an integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return int(text)


def count(text: str) -> int:
    """The type of a flag: an integer."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return int(text)


def seconds(text: str) -> float:
    """The type of a flag: a duration in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def resolve(command: str) -> str:
    """The path of a command; `llmjax` and `python` are those of this environment, else of the checkout's .venv."""
    own = pathlib.Path(sys.executable).parent
    for folder in (own, pathlib.Path(__file__).resolve().parents[1] / ".venv" / "bin"):
        if command in ("llmjax", "python") and os.access(folder / command, os.X_OK):
            return str(folder / command)
    return shutil.which(command) or command


def log(line: str) -> None:
    """Print a line of the launcher."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"[local] {line}", flush=True)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """One start of all processes, from first to last exit."""

    def __init__(self, options: argparse.Namespace, stop: threading.Event):
        self.options, self.stop = options, stop
        self.processes: list[subprocess.Popen] = []
        self.deadline: float | None = None

    def run(self) -> int:
        """Run the job to its end. Returns 0, the first exit status with a reason, or else the first of a crash."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._forward)
        coordinator = f"127.0.0.1:{free_port()}"
        readers, failed = [], []
        try:
            for index in range(self.options.processes):
                self.processes.append(self._start(index, coordinator))
                readers.append(threading.Thread(target=self._print_lines, args=(index,), daemon=True))
                readers[-1].start()
            if self.stop.is_set():  # a signal arrived while they were being started
                self._signal(signal.SIGTERM)
            running = dict(enumerate(self.processes))
            while running:
                for index in [index for index, process in running.items() if process.poll() is not None]:
                    status = exit_status(running.pop(index).returncode)
                    if status:
                        failed.append(status)
                        self._set_deadline(index, status, len(running))
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self._signal(signal.SIGKILL)
                time.sleep(0.02)
        finally:
            self._signal(signal.SIGKILL)
            for reader in readers:
                reader.join(timeout=5)
        return next((status for status in failed if status in REASONS), failed[0] if failed else 0)

    def _start(self, index: int, coordinator: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "LLMJAX_COORDINATOR": coordinator,
            "LLMJAX_NUM_PROCESSES": str(self.options.processes),
            "LLMJAX_PROCESS_ID": str(index),
            "LLMJAX_LAUNCHER_PID": str(os.getpid()),
            "JAX_COORDINATOR_BIND_ADDRESS": coordinator,  # JAX would listen on every interface
            "PYTHONUNBUFFERED": "1",
        }
        if self.options.devices:
            environment |= {"LLMJAX_CPU_DEVICES": str(self.options.devices), "JAX_PLATFORMS": "cpu"}
        try:
            # In a new session, Ctrl-C reaches the processes once, through this launcher.
            return subprocess.Popen(
                self.options.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            print(f"launch/local.py: error: cannot run {self.options.command[0]}: {error.strerror}", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from None

    def _print_lines(self, index: int) -> None:
        """Print the lines of a process, each with its index as prefix."""
        stream = self.processes[index].stdout
        assert stream is not None
        for line in stream:
            with contextlib.suppress(OSError):  # the terminal may be gone; unread output would block the process
                sys.stdout.write(f"[p{index}] {line.decode(errors='replace').rstrip()}\n")
                sys.stdout.flush()

    def _forward(self, number: int, frame) -> None:
        if self.stop.is_set():
            with contextlib.suppress(OSError):
                os.write(1, b"[local] second signal: killing all processes; steps since the last checkpoint are lost\n")
            self._signal(signal.SIGKILL)
        self.stop.set()
        self._signal(signal.SIGTERM)
        self.deadline = time.monotonic() + self.options.grace

    def _set_deadline(self, index: int, status: int, running: int) -> None:
        """Give the other processes some seconds to end by themselves after one failed."""
        if running and self.deadline is None:
            seconds = min(self.options.grace, 10.0)
            log(f"process {index} ended with {status}; the other {running} get {seconds:g} s")
            self.deadline = time.monotonic() + seconds

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)


def exit_status(code: int) -> int:
    """The exit status as a shell shows it: 128 + signal for a process that a signal ended."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
