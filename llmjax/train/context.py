"""The fixed parts of a training job, and the progress that a checkpoint saves."""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np

import llmjax
from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import DataState, TrainData
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.evals import harness
from llmjax.metrics import MetricsLog
from llmjax.run import config as run_config, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec, TrainState


@dataclasses.dataclass
class Progress:
    """What moves as a run goes on. `state` is on the mesh as global arrays; `tokens` counts scored targets so far."""

    step: int
    tokens: int
    state: TrainState
    data_state: DataState


@dataclasses.dataclass(frozen=True)
class TrainContext:
    """The fixed parts of a run."""

    config: RunConfig
    workdir: epath.Path
    store: pathlib.Path
    mesh: Mesh
    spec: StateSpec
    data: TrainData
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    evaluator: harness.Evaluator
    log: MetricsLog
    lock: workdirs.Lock
    say: Callable[[str], None]

    def save(self, progress: Progress) -> None:
        """Start writing a checkpoint of `progress`; training goes on meanwhile."""
        meta = {
            "config": run_config.to_json(self.config),
            "data_state": progress.data_state.to_json(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "tokens": progress.tokens,
            "skipped": int(np.asarray(progress.state.skipped)),
            "versions": {"llmjax": llmjax.__version__, "jax": jax.__version__},
        }
        self.lock.check()
        self.log.flush()
        self.checkpoints.save(progress.step, states.to_checkpoint(progress.state), meta)

    def eval_params(self, state: TrainState) -> dict:
        """The parameters that are evaluated, sampled and exported."""
        return self.spec.optimizer.eval_params(state.params, state.opt_state)

    def evaluate(self, step: int, state: TrainState, split: str) -> dict[str, Any]:
        """Score one split and write eval/<step>/<split>.json."""
        scores = self.evaluator.split(self.eval_params(state), split, self.say)
        self.lock.check()
        harness.write(
            self.workdir,
            step,
            scores,
            parameters=self.spec.optimizer.eval_params_name,
            fingerprint=fingerprint(state.params, state.opt_state),
        )
        self.log.scalars(step, {f"{split}/{name}": value for name, value in scores["total"].items()})
        return scores
