"""What is fixed during a training run, and the progress that a checkpoint saves."""

import dataclasses
from typing import Any

from etils import epath
import jax
import numpy as np

import llmjax
from llmjax.batch import Params
from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import DataState, TrainData
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.evals import harness
from llmjax.metrics import MetricsLog
from llmjax.run import config as run_config, loading, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec, TrainState
from llmjax.train.preemption import Preemption


@dataclasses.dataclass
class Progress:
    """What changes during a run. `state` is on the mesh as global arrays; `total_targets` counts scored targets."""

    step: int
    total_targets: int
    state: TrainState
    data_state: DataState


@dataclasses.dataclass(frozen=True)
class TrainContext:
    """What is fixed during a run. `manifest` is that of the token store.

    remat_reason   why model.remat="auto" took the config's policy; "" where the policy is explicit
    """

    config: RunConfig
    workdir: epath.Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    objective: Objective
    data: TrainData
    spec: StateSpec
    checkpoints: Checkpoints
    evaluator: harness.Evaluator
    log: MetricsLog
    lock: workdirs.Lock
    remat_reason: str = ""

    @property
    def last_step(self) -> int:
        """The step at which this process stops: train.stop_at, or train.steps."""
        return self.config.train.stop_at or self.config.train.steps

    def save(self, progress: Progress) -> None:
        """Start writing a checkpoint of `progress`; training continues meanwhile."""
        meta = {
            "config": run_config.to_json(self.config),
            "data_state": progress.data_state.to_json(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "total_targets": progress.total_targets,
            "skipped": int(np.asarray(progress.state.skipped)),
            "versions": {"llmjax": llmjax.__version__, "jax": jax.__version__},
        }
        self.lock.check()
        self.log.flush()
        self.checkpoints.save(progress.step, states.to_checkpoint(progress.state), meta)

    def eval_params(self, state: TrainState) -> Params:
        """The parameters that are evaluated, sampled and exported."""
        return self.spec.optimizer.eval_params(state.params, state.opt_state)

    def evaluate(self, step: int, state: TrainState, preemption: Preemption | None = None) -> dict[str, Any] | None:
        """Score the validation split and write eval/<step>/validation.json; None where `preemption` stops it."""
        should_stop = preemption.reached if preemption else lambda: False
        scores = self.evaluator.score_split(self.eval_params(state), "validation", should_stop)
        if scores is None:
            return None
        self.lock.check()
        harness.write(
            self.workdir,
            step,
            scores,
            parameters=self.spec.optimizer.eval_params_name,
            fingerprint=fingerprint(state.params, state.opt_state),
        )
        self.log.scalars(step, {f"validation/{name}": value for name, value in scores["total"].items()})
        return scores

    def loaded(self, progress: Progress, fingerprint: str) -> loading.Loaded:
        """The model of `progress`, as a command loads it from a checkpoint."""
        return loading.Loaded(
            config=self.config,
            step=progress.step,
            graph=self.spec.graph,
            params=self.eval_params(progress.state),
            params_name=self.spec.optimizer.eval_params_name,
            tokenizer=self.tokenizer,
            objective=self.objective,
            store=self.evaluator.store,
            fingerprint=fingerprint,
        )
