"""The loop of the thread that owns the devices: generation and embeddings take turns."""

from collections.abc import Callable, Sequence
import threading
from typing import Protocol


class Part(Protocol):
    """What computes on the devices for requests.

    on_submit   the part calls it after each new request, in any thread
    """

    on_submit: Callable[[], None]

    def step(self) -> bool:
        """Do a bounded part of the work; whether some is left."""
        ...


class Loop:
    """Calls the steps of its parts in turn while one of them has work, in the thread that has entered the mesh."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts
        self._wake = threading.Event()
        self._is_closed = False
        for part in parts:
            part.on_submit = self._wake.set

    def run(self) -> None:
        """Serve requests until `close`."""
        while not self._is_closed:
            self._wake.clear()  # before the steps, so that a request which comes after them is not missed
            has_work = [part.step() for part in self._parts]
            if not any(has_work) and not self._is_closed:
                self._wake.wait()

    def close(self) -> None:
        """Let `run` return, from any thread."""
        self._is_closed = True
        self._wake.set()
