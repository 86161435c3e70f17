"""SIGTERM, SIGHUP or Ctrl-C during training: all processes save the same step and stop."""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils

from llmjax.parallel import interrupts


class Preemption:
    """Whether the job was asked to stop. A second signal ends a process at once and says what is lost.

    lost          called at that second signal: what has not been saved
    interrupted   a block of `interruptible` was ended by a signal
    """

    def __init__(self, lost: Callable[[], str]):
        self._lost, self._asked, self._at_once, self.interrupted = lost, False, False, False
        # With several processes JAX's own notifier takes SIGTERM and agrees on a step; other signals are passed to it.
        self._single = jax.process_count() == 1
        self._old = {}
        for number in interrupts.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN and (self._single or number != signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        if not self._single:
            interrupts.give_back_sigterm()
        self._deferred = interrupts.deferred()
        self._deferred.__enter__()

    def _ask(self, number, frame) -> None:
        interrupts.drop_dead_terminal()
        if self._asked:
            raise interrupts.Stopped(number, self._lost())
        self._asked = True
        if self._at_once:
            self.interrupted = True
            raise interrupts.Stopped(number)
        if not self._single:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, the first signal of a single process ends the block: an evaluation is not worth waiting for."""
        self._at_once = self._single
        try:
            yield
        except interrupts.Stopped as stopped:
            if stopped.lost:  # the second signal
                raise
        finally:
            self._at_once = False

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process calls it at every step and gets the same answer."""
        return self._asked if self._single else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        self._deferred.__exit__(None, None, None)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if not self._single:
            interrupts.take_over_sigterm()
