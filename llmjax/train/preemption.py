"""A polite end: SIGTERM or Ctrl-C asks all processes of a job to save the same step and stop."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Whether the job was asked to stop. A second signal of a single process ends it at once."""

    def __init__(self):
        self._asked = False
        # With several processes JAX's own notifier takes SIGTERM and agrees on a step; a handler would replace it.
        self._single = jax.process_count() == 1
        if self._single:
            self._old = {name: signal.signal(name, self._ask) for name in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number, frame) -> None:
        self._asked = True
        self.close()

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process calls it at every step and gets the same answer."""
        return self._asked if self._single else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        if self._single:
            for name, handler in self._old.items():
                signal.signal(name, handler)
