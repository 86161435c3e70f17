"""A JAX profiler trace of some training steps, for `train.profile`."""

import logging
from typing import Any

from etils import epath
import jax

from llmjax import atomic
from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.run import workdir as workdirs
from llmjax.run.config import TrainConfig

logger = logging.getLogger(__name__)


def check_profile(train: TrainConfig, workdir: epath.Path) -> None:
    """Raise UserError where `train.profile` cannot be written: JAX's profiler needs a disk."""
    if train.profile and atomic.is_remote(workdir):
        raise UserError(
            f"train.profile={train.profile}: the profiler cannot write to {workdir}; use a --workdir on a disk, or "
            "set train.profile=()"
        )


class Profiler:
    """Traces the steps of `train.profile` (the window) on the primary process, to WORKDIR/profile.

    next_step  the first step that this process runs; steps of the window before it are not traced
    """

    def __init__(self, train: TrainConfig, workdir: epath.Path, next_step: int):
        first, steps = train.profile or (1, 0)
        self._window = range(first, first + steps) if hosts.is_primary() else range(0)
        self._folder = workdir / workdirs.PROFILE
        self._first = self._last = 0  # first and last step of the open trace; 0: no trace is open
        if self._window and next_step >= self._window.stop:
            logger.info("train.profile=%s: these steps are done, so no trace is written", train.profile)

    def before_step(self, step: int, state: Any) -> None:
        """Start the trace at the first step of the window, once the device has finished earlier steps."""
        if step not in self._window or self._first:
            return
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls slow the host and fill the trace
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._first = step

    def after_step(self, step: int, state: Any) -> None:
        """Write the trace after the last step of the window, once the device has finished it."""
        if not self._first:
            return
        self._last = step
        if step == self._window[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write an open trace and log its folder; the run may end inside the window.

        The caller has waited for the last step, as training does when it reads that step's metrics.
        """
        if not self._first:
            return
        first, self._first = self._first, 0
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:  # a full disk must not end the run
            logger.info("no profile of steps %d to %d: %s; training continues", first, self._last, error)
            return
        newest = max(self._folder.glob("plugins/profile/*"), key=lambda folder: folder.name)
        logger.info(
            "profile of steps %d to %d: %s; open its *.trace.json.gz at https://ui.perfetto.dev, or run "
            "`tensorboard --logdir=%s` with tensorboard-plugin-profile",
            *(first, self._last, newest, self._folder),
        )
