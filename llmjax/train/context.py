"""What is fixed during a training run, and the progress that a checkpoint saves."""

import dataclasses
import itertools
from typing import Any

from etils import epath
import jax
import numpy as np

import llmjax
from llmjax.batch import Params
from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.checkpoint.manager import Checkpoints
from llmjax.checkpoint.replicas import check_replicas
from llmjax.data.batches.pipeline import DataState
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.evals import harness
from llmjax.evals.tasks.run import TaskScorer
from llmjax.metrics import MetricsLog
from llmjax.parallel.watchdog import Watchdog
from llmjax.run import config as run_config, loading, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec, TrainState
from llmjax.train import best
from llmjax.train.phases import TrainPhase
from llmjax.train.preemption import Preemption
from llmjax.train.teacher import Teacher


@dataclasses.dataclass
class Progress:
    """What changes during a run.

    total_targets   scored targets since step 0
    state           on the mesh as global arrays
    evaluations     scores of the evaluations so far, that of the end not included
    best_loss       what MetricsLogger compares losses with; None: not enough steps yet
    """

    step: int
    total_targets: int
    state: TrainState
    data_state: DataState
    evaluations: best.Evaluations = dataclasses.field(default_factory=dict)
    best_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainContext:
    """What is fixed during a run. `manifest` is that of the token store.

    objective      of the rows of the last phase, with which the run is evaluated
    started        when this process began to set up the run, in seconds since 1970
    teacher        whose predictions the run learns; None: it learns the targets alone
    remat_reason   why model.remat="auto" took the config's policy; "" where the policy is explicit
    """

    config: RunConfig
    workdir: epath.Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    objective: Objective
    phases: tuple[TrainPhase, ...]
    spec: StateSpec
    checkpoints: Checkpoints
    evaluator: harness.Evaluator
    log: MetricsLog
    lock: workdirs.Lock
    watchdog: Watchdog
    tasks: TaskScorer
    started: float
    teacher: Teacher | None = None
    remat_reason: str = ""

    @property
    def eval_config(self) -> RunConfig:
        """The config with which the run is evaluated: rows have the length of the last phase."""
        return self.phases[-1].phase.config

    @property
    def last_step(self) -> int:
        """The step at which this process stops: train.stop_at, or train.steps."""
        return self.config.train.stop_at or self.config.train.steps

    def best_step(self, progress: Progress) -> int | None:
        """The step of the best evaluation so far by eval.metric."""
        return best.find_best(progress.evaluations, self.config.eval.metric)

    def should_stop_early(self, progress: Progress) -> bool:
        """Whether eval.stop_after evaluations in a row did not improve eval.metric."""
        return best.is_exhausted(progress.evaluations, self.config.eval.metric, self.config.eval.stop_after)

    def save(self, progress: Progress) -> None:
        """Start writing a checkpoint of `progress`; training continues meanwhile.

        Raises HardwareError, and saves nothing, where the copies of the state on different devices differ.
        """
        meta = {
            "config": run_config.to_json(self.config),
            "data_state": progress.data_state.to_json(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "total_targets": progress.total_targets,
            "evaluations": progress.evaluations,
            "best_loss": progress.best_loss,
            "skipped": int(np.asarray(progress.state.skipped)),
            "versions": {"llmjax": llmjax.__version__, "jax": jax.__version__},
        }
        self.watchdog.enter("save", progress.step)
        check_replicas(progress.state)
        self.lock.check()
        self.log.flush()
        self.checkpoints.wait()
        self.watchdog.enter("save", progress.step)  # the previous save and this one each have the whole limit
        if self.config.checkpoint.keep_best:
            self.checkpoints.best = self.best_step(progress)
        self.checkpoints.save(progress.step, states.to_checkpoint(progress.state), meta)

    def eval_params(self, state: TrainState) -> Params:
        """The parameters that are evaluated, sampled and exported."""
        return self.spec.eval_params(state.params, state.opt_state)

    def evaluate(self, step: int, state: TrainState, preemption: Preemption | None = None) -> dict[str, Any] | None:
        """Score the validation split and the tasks of eval.during_training, and write their files in eval/<step>.

        Returns the content of validation.json, and "tasks" as of `score_tasks`; None where `preemption` stops it.
        """
        phases = itertools.chain(["compile"], itertools.repeat("eval"))  # the first batch compiles

        def should_stop() -> bool:
            self.watchdog.enter(next(phases), step)
            return preemption is not None and preemption.reached()

        scores = self.evaluator.score_split(self.eval_params(state), "validation", should_stop)
        if scores is None:
            return None
        self.watchdog.enter("eval", step)
        self.lock.check()
        parameters, identity = self.spec.optimizer.eval_params_name, fingerprint(state.params, state.opt_state)
        harness.write(self.workdir, step, scores, parameters=parameters, fingerprint=identity)
        tasks = self.score_tasks(step, state, identity, preemption)
        if tasks is None:
            return None
        self.log.scalars(step, {f"validation/{name}": value for name, value in scores["total"].items()} | tasks)
        return {**scores, "tasks": tasks}

    def score_tasks(
        self, step: int, state: TrainState, fingerprint: str, preemption: Preemption | None = None
    ) -> dict[str, float] | None:
        """TASK/METRIC -> value for the tasks of eval.during_training; None where `preemption` stops it.

        Results that an earlier start wrote for this state are read.
        """
        scores: dict[str, float] = {}
        for name in self.config.eval.during_training:
            self.watchdog.enter("compile", step)  # a task has no limit of its own
            if preemption is not None and preemption.reached():
                return None
            self.lock.check()
            scores |= self.tasks.score(self.workdir, self.loaded(step, state, fingerprint), name)
        return scores

    def loaded(self, step: int, state: TrainState, fingerprint: str) -> loading.Loaded:
        """The model of a state, as a command loads it from a checkpoint."""
        return loading.Loaded(
            config=self.eval_config,
            step=step,
            graph=self.spec.graph,
            params=self.eval_params(state),
            params_name=self.spec.optimizer.eval_params_name,
            tokenizer=self.tokenizer,
            objective=self.objective,
            store=self.evaluator.store,
            fingerprint=fingerprint,
        )
