"""SIGTERM, SIGHUP and Ctrl-C end any command with one line and exit status 128 + signal.

Training handles them itself while it steps (train.preemption): it saves and ends with 85.
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
_PATIENCE_SECONDS = 10.0  # for Python code to end: while it compiles, the main thread runs no handler
_BUFFER_BYTES = 1024  # more than a C library's struct sigaction takes


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal that asks to stop. `lost` says what an unfinished save costs, or ''."""

    def __init__(self, number: int, lost: str = ""):
        super().__init__(number, lost)
        self.number, self.lost = number, lost

    def __str__(self) -> str:
        return describe(self.number, self.lost)

    @property
    def status(self) -> int:
        return 128 + self.number


def describe(number: int, lost: str = "") -> str:
    """One line for the user."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"stopped by {name}{f'; {lost}' if lost else ''}: rerun the same command to resume"


_deferred = threading.Event()  # set while training handles the first signal itself
_handlers: list[Any] = []  # the C handler of SIGTERM that was there before `install`, if there was one
_watching = False


def install() -> None:
    """Have the signals raise Stopped in the main thread. One that the parent ignores (nohup) stays ignored.

    Where the main thread does not react within 10 s, as in a long compilation, the process ends all the same.
    """
    global _watching
    with contextlib.suppress(ValueError):  # not the main thread: a command that was started as a function
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _stop)
        if not _watching:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            sys.unraisablehook = functools.partial(_raise_again, sys.unraisablehook)
            threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
            _watching = True


def take_over_sigterm() -> None:
    """Replace the SIGTERM handler of JAX's preemption notifier until `give_back_sigterm`.

    It only takes note of the signal, so that a job of several processes could not be stopped outside its step loop.
    """
    if not _watching:
        return
    previous = ctypes.create_string_buffer(_BUFFER_BYTES)
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, previous)
    _handlers[:] = [previous]
    signal.signal(signal.SIGTERM, _stop)


def give_back_sigterm() -> None:
    """Let JAX's notifier handle SIGTERM: all processes then agree on a step to stop at."""
    if _handlers:
        ctypes.CDLL(None).sigaction(int(signal.SIGTERM), _handlers[0], None)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal is left to a handler that the caller installed, however long it takes."""
    _deferred.set()
    try:
        yield
    finally:
        _deferred.clear()


def drop_dead_terminal() -> None:
    """Send output nowhere if its terminal is gone, as after a broken ssh connection: printing would raise."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def exit_now(stopped: Stopped) -> NoReturn:
    """Print why the command ends and end it, without waiting for threads that may still be working."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    drop_dead_terminal()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(f"llmjax: {stopped}", file=sys.stderr, flush=True)
    os._exit(stopped.status)


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


def _raise_again(hook: Callable[[Any], None], unraisable: Any) -> None:
    """Python drops an exception that is raised in a destructor or a callback; the signal is then sent once more."""
    if isinstance(unraisable.exc_value, Stopped):
        number = unraisable.exc_value.number
        threading.Timer(0.1, lambda: os.kill(os.getpid(), number)).start()
    else:
        hook(unraisable)


def _watch(reader: int) -> None:
    """End the process some seconds after a signal that its main thread did not react to."""
    earlier = 0
    while True:
        number = os.read(reader, 1)[0]
        if number not in SIGNALS:
            continue
        if _deferred.is_set() and not earlier:
            earlier = number
            continue
        time.sleep(_PATIENCE_SECONDS)
        drop_dead_terminal()
        lost = "the steps since the newest checkpoint are lost" if earlier else ""
        print(f"llmjax: {describe(number, lost)}", file=sys.stderr, flush=True)
        os._exit(128 + number)
