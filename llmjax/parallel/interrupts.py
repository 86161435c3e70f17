"""SIGTERM, SIGHUP and Ctrl-C end any command with one line and exit status 128 + signal.

The training loop has handlers of its own (train.preemption): it saves a checkpoint and ends with status 85, however
many signals arrive.
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

SIGNALS = tuple(
    number
    for name in ("SIGTERM", "SIGHUP", "SIGINT")
    if (number := getattr(signal, name, None)) is not None  # Windows has no SIGHUP
)
_REACTION_SECONDS = 10.0  # while the main thread compiles, it runs no Python signal handler
_BUFFER_BYTES = 1024  # more than the size of struct sigaction in any C library


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal that requests a stop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return describe(self.number)

    @property
    def status(self) -> int:
        """The exit status."""
        return 128 + self.number


def describe(number: int) -> str:
    """One line for the user."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"stopped by {name}: rerun the same command to resume"


_deferred = threading.Event()  # set inside `deferred`: the training loop handles signals
_saved_sigterm: list[Any] = []  # the C handler of SIGTERM before `take_over_sigterm`; empty: not taken over
_watching = False


def install() -> None:
    """Make the signals raise Stopped in the main thread. A signal that the parent ignores (nohup) stays ignored.

    If the main thread does not react within 10 s, as in a long compilation, the process ends anyway.
    """
    global _watching
    with contextlib.suppress(ValueError):  # not the main thread: a command that runs as a function of a program
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _raise_stopped)
        if not _watching:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            sys.unraisablehook = functools.partial(_resend_signal, sys.unraisablehook)
            threading.Thread(target=_end_if_unresponsive, args=(reader,), name="signals", daemon=True).start()
            _watching = True


def take_over_sigterm() -> None:
    """Replace the SIGTERM handler of JAX's preemption notifier until `restore_sigterm`.

    The notifier only records the signal, so a job of several processes could not be stopped outside its step loop.
    """
    if not _watching:
        return
    previous = ctypes.create_string_buffer(_BUFFER_BYTES)
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, previous)
    _saved_sigterm[:] = [previous]
    signal.signal(signal.SIGTERM, _raise_stopped)


def restore_sigterm() -> None:
    """Let JAX's notifier handle SIGTERM: all processes then agree on a step to stop at."""
    if _saved_sigterm:
        ctypes.CDLL(None).sigaction(int(signal.SIGTERM), _saved_sigterm[0], None)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the caller's handler may take any time for a signal."""
    _deferred.set()
    try:
        yield
    finally:
        _deferred.clear()


def drop_dead_terminal() -> None:
    """Discard output if its terminal is gone, as after a broken ssh connection: printing would raise."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def exit_now(stopped: Stopped) -> NoReturn:
    """Print why the command ends and end it, without waiting for other threads."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    drop_dead_terminal()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(f"llmjax: {stopped}", file=sys.stderr, flush=True)
    os._exit(stopped.status)


def _raise_stopped(number: int, frame: Any) -> None:
    raise Stopped(number)


def _resend_signal(hook: Callable[[Any], None], unraisable: Any) -> None:
    """Send the signal again where Python dropped its exception, which was raised in a destructor or a callback."""
    if isinstance(unraisable.exc_value, Stopped):
        number = unraisable.exc_value.number
        threading.Timer(0.1, lambda: os.kill(os.getpid(), number)).start()
    else:
        hook(unraisable)


def _end_if_unresponsive(reader: int) -> None:
    """End the process some seconds after a signal to which the main thread did not react."""
    while True:
        number = os.read(reader, 1)[0]
        if number not in SIGNALS or _deferred.is_set():
            continue
        time.sleep(_REACTION_SECONDS)
        drop_dead_terminal()
        print(f"llmjax: {describe(number)}", file=sys.stderr, flush=True)
        os._exit(128 + number)
