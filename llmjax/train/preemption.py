"""SIGTERM, SIGHUP or Ctrl-C during training: all processes save the same step and stop. Further ones change nothing."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from llmjax.parallel import interrupts


class Preemption:
    """Whether the job was requested to stop. Signals after the first one have no effect until `close`.

    agreed      whether `reached` has returned True: all processes stop
    """

    def __init__(self):
        self.agreed = False
        self._requested, self._checks = False, 0
        # With several processes JAX's own notifier handles SIGTERM; other signals are passed on to it as SIGTERM.
        self._is_single = jax.process_count() == 1
        self._old_handlers = {}
        for number in interrupts.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN and (self._is_single or number != signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._request)
        if not self._is_single:
            interrupts.restore_sigterm()
        self._deferred = interrupts.deferred()
        self._deferred.__enter__()

    def _request(self, number, frame) -> None:
        interrupts.drop_dead_terminal()
        if not self._requested and not self._is_single:
            os.kill(os.getpid(), signal.SIGTERM)
        self._requested = True

    def reached(self) -> bool:
        """Whether to stop here. All processes call it at the same points and get the same answer.

        After a signal, JAX's coordination service chooses the number of a future call, and at that call all processes
        return True. So this counts its calls, of training steps and of batches of evaluations.
        """
        if self._is_single:
            self.agreed = self._requested
        elif not self.agreed:
            self._checks += 1
            self.agreed = multihost_utils.reached_preemption_sync_point(self._checks)
        return self.agreed

    def close(self) -> None:
        """Restore the signal handlers that were there before."""
        self._deferred.__exit__(None, None, None)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if not self._is_single:
            interrupts.take_over_sigterm()
