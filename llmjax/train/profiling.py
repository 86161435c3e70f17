"""A JAX profiler trace of some training steps, for `train.profile`."""

from collections.abc import Callable
from typing import Any

from etils import epath
import jax

from llmjax import atomic
from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.run import workdir as workdirs
from llmjax.run.config import TrainConfig


def check_profile(train: TrainConfig, workdir: epath.Path) -> None:
    """Raise UserError where `train.profile` cannot be written: JAX's profiler needs a disk."""
    if train.profile and atomic.is_remote(workdir):
        raise UserError(
            f"train.profile={train.profile}: the profiler cannot write to {workdir}; use a --workdir on a disk, or "
            "set train.profile=()"
        )


class Profiler:
    """Traces the steps of `train.profile` on the primary process, to WORKDIR/profile; the others do nothing.

    train      train.profile is (first step, number of steps), or () for no trace
    next_step  the first step that this process runs; a window that starts before it loses its first steps
    say        called with a line for the user
    """

    def __init__(self, train: TrainConfig, workdir: epath.Path, next_step: int, say: Callable[[str], None]):
        first, steps = train.profile or (1, 0)
        self._window = range(first, first + steps) if hosts.is_primary() else range(0)
        self._folder, self._say = workdir / workdirs.PROFILE, say
        self._first = self._last = 0  # the steps traced so far; 0: no trace is open
        if self._window and next_step >= self._window.stop:
            say(f"train.profile={train.profile}: these steps are done, so no trace is written")

    def before_step(self, step: int, state: Any) -> None:
        """Start the trace where it is due, once the device has finished the steps before."""
        if step not in self._window or self._first:
            return
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls slow the host down and crowd operations out of the trace
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._first = step

    def after_step(self, step: int, state: Any) -> None:
        """Write the trace after its last step, once the device has finished it."""
        if not self._first:
            return
        self._last = step
        if step == self._window[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write an open trace and print where it is: the run may end inside the window.

        The caller has waited for the last step, as training does when it reads that step's metrics.
        """
        if not self._first:
            return
        first, self._first = self._first, 0
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:  # a disk that is full must not end the run
            self._say(f"no profile of steps {first} to {self._last}: {error}; training continues")
            return
        newest = max(self._folder.glob("plugins/profile/*"), key=lambda folder: folder.name)
        self._say(
            f"profile of steps {first} to {self._last}: {newest}; open its *.trace.json.gz at "
            f"https://ui.perfetto.dev, or run `tensorboard --logdir={self._folder}` with tensorboard-plugin-profile"
        )
