#!/usr/bin/env python3
"""Run several processes on this machine as one job, or one process of a larger job, and restart it when it fails."""

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

from command_line import Parser, count, positive
from restarts import BAD_INPUT, Policy, find_workdir, job_status, newest_step

HELP = """\
Runs a command as one job of several processes on this machine:

  launch/local.py --processes=2 --devices=4 -- llmjax train --config=configs/quickstart.py --workdir=runs/two

Every process gets LLMJAX_COORDINATOR, LLMJAX_NUM_PROCESSES, LLMJAX_PROCESS_ID and LLMJAX_LOCAL_PROCESSES; its lines
begin with [p0], [p1], ... The processes divide the GPUs of this machine evenly.
With --devices=M each process emulates M CPU devices (JAX_PLATFORMS=cpu), so that 2 x 4 devices form a mesh of 8.
Without --processes the command runs once, as a process of the job that its environment describes (a TPU slice, or
variables set by hand): then this program only passes signals on and restarts the command.
SIGTERM, SIGHUP and Ctrl-C are sent to all processes as SIGTERM: they save a checkpoint and exit with 85. Processes
that still run after --grace seconds are killed with SIGKILL. Further signals change nothing.
When one process fails, the others are stopped too. The exit status is 0 when all succeeded, else the highest of 76
(diverged), 77 (hardware suspected) and 78 (bad input), else the first of 75 (hang), 85 (stopped and saved), 129, 130
and 143 (stopped with nothing to save), else that of the first process that crashed.
With --restarts=R the job is started again: at once after 85; after 1, 2, 4, ... 60 s after 75 and after a crash; never
after 0, 76, 77 and 78, or after a signal to this program. It is not started again after R restarts within --window
seconds, or when two restarts in a row wrote no newer checkpoint to the --workdir of the command.
"""


def main() -> int:
    """Run the job, restart it as --restarts says, and return its exit status."""
    options = parse(sys.argv[1:])
    policy, workdir = Policy(options.restarts, options.window), find_workdir(options.command)
    if options.restarts and workdir is None:
        log("no --workdir on this machine: restarts without progress are not recognised")
    stop = threading.Event()
    while True:
        status = Job(options, stop).run()
        if stop.is_set():
            return status
        pause, line = policy.decide(status, time.monotonic(), newest_step(workdir))
        if options.restarts and status:
            log(line)
        if pause is None or stop.wait(pause):
            return status


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with `command` as the list of what every process runs."""
    parser = Parser(
        prog="launch/local.py",
        usage="launch/local.py [--processes=N] [--devices=M] [options] -- COMMAND ...",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=positive, metavar="N", help="processes of the job")
    parser.add_argument("--devices", type=positive, metavar="M", help="emulated CPU devices in each process")
    parser.add_argument("--restarts", type=count, default=0, metavar="R", help="restarts in a window (default 0)")
    parser.add_argument("--window", type=seconds, default=3600.0, metavar="S", help="its seconds (default 3600)")
    parser.add_argument(
        "--grace", type=seconds, default=30.0, metavar="S", help="seconds from SIGTERM to SIGKILL (default 30)"
    )
    options = parser.parse_job(arguments, "every process")
    options.command[0] = resolve(options.command[0])
    return options


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
        """Run the job to its end. Returns its exit status, as --help describes it."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._forward)
        coordinator = f"127.0.0.1:{free_port()}"
        prefixes = [f"[p{index}] " for index in range(self.options.processes or 0)] or [""]
        readers, failed = [], []
        try:
            for index, prefix in enumerate(prefixes):
                self.processes.append(self._start(index, coordinator))
                readers.append(threading.Thread(target=self._print_lines, args=(index, prefix), daemon=True))
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
        return job_status(failed)

    def _start(self, index: int, coordinator: str) -> subprocess.Popen:
        environment = {**os.environ, "LLMJAX_LAUNCHER_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if self.options.processes:
            environment |= {
                "LLMJAX_COORDINATOR": coordinator,
                "LLMJAX_NUM_PROCESSES": str(self.options.processes),
                "LLMJAX_PROCESS_ID": str(index),
                "LLMJAX_LOCAL_PROCESSES": str(self.options.processes),  # they divide the GPUs of this machine
            }
            environment.pop("JAX_COORDINATOR_BIND_ADDRESS", None)  # of another coordinator
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

    def _print_lines(self, index: int, prefix: str) -> None:
        """Print the lines of a process, each after a prefix."""
        stream = self.processes[index].stdout
        assert stream is not None
        for line in stream:
            with contextlib.suppress(OSError):  # the terminal may be gone; unread output would block the process
                sys.stdout.write(f"{prefix}{line.decode(errors='replace').rstrip()}\n")
                sys.stdout.flush()

    def _forward(self, number: int, frame) -> None:
        if self.stop.is_set():
            return
        self.stop.set()
        line = f"[local] {signal.Signals(number).name}: the processes get {self.options.grace:g} s to save and end\n"
        with contextlib.suppress(OSError):
            os.write(1, line.encode())
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
