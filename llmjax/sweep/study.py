"""The study of a sweep: an Optuna journal in the workdir, from which any number of processes take trials.

Each process asks for one trial at a time, under a lock on the workdir. The process that runs a trial holds a lock in
the trial's folder; a running trial whose lock nobody holds is resumed by the next process that asks.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import logging
import math
import time
import warnings

from etils import epath
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from llmjax.errors import UserError
from llmjax.evals import results
from llmjax.run import workdir as workdirs
from llmjax.sweep import space, training
from llmjax.sweep.space import Range

JOURNAL = "sweep.journal"
TRIALS = "trials"  # trials/<number>: the workdir of each run
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "none")
_ASK_LOCK, _WORKER_LOCK = "ask.lock.json", "worker.lock.json"
_NAME = "sweep"
_STARTUP_TRIALS = 4  # finished ones, before a trial is compared with their median
_WAIT_SECONDS = 2.0

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the processes of a sweep have in common.

    ranges     the fields that vary
    metric     of each evaluation, which decides
    keeps_best whether the best evaluation of a run is its score, since its checkpoint is kept, or the last one
    sampler    tpe, random or grid
    pruner     median or none
    trials     of all processes together, failed ones included
    command    (FIELD, TEXT) of a trial, its workdir -> the words that train it; puts imported parameters there
    """

    ranges: Sequence[Range]
    metric: str
    keeps_best: bool
    sampler: str
    pruner: str
    seed: int
    trials: int
    command: Callable[[Sequence[tuple[str, str]], epath.Path], list[str]]

    @property
    def num_trials(self) -> int:
        """At most the size of the grid."""
        if self.sampler != "grid":
            return self.trials
        return min(self.trials, math.prod(len(each.grid) for each in self.ranges))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial: its state (complete, pruned, failed, running), overrides, score, seconds of its run where that has
    recorded them, reason of a failure, and validation scores by step."""

    number: int
    state: str
    overrides: Sequence[tuple[str, str]]
    score: float | None
    seconds: float | None
    error: str
    curve: Sequence[tuple[float, float]]


def trial_folder(workdir: epath.Path, number: int) -> epath.Path:
    """The workdir of a trial."""
    return workdir / TRIALS / f"{number:03d}"


def open_study(plan: Plan, workdir: epath.Path) -> optuna.Study:
    """The study in WORKDIR/sweep.journal, which is created if it is missing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    backend = JournalFileBackend(str(workdir / JOURNAL))
    if plan.pruner == "median":
        pruner: optuna.pruners.BasePruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS)
    else:
        pruner = optuna.pruners.NopPruner()
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=_NAME,
        direction="minimize" if results.is_eval_metric_lower_better(plan.metric) else "maximize",
        load_if_exists=True,
        pruner=pruner,
    )


def run_trials(plan: Plan, workdir: epath.Path) -> int:
    """Run trials until all of the plan are done or taken. Returns 0, or 85 where a run was asked to stop from outside.

    A trial that fails does not end the sweep. An exception, such as that of a signal, leaves the trial to be resumed.
    """
    study, reported = open_study(plan, workdir), False
    while True:
        with workdirs.Lock(workdir, primary=True, wait=True, name=_ASK_LOCK):
            trial, worker_lock, orphans = _take_trial(study, plan, workdir)
            if trial is not None and worker_lock is not None:
                worker_lock.__enter__()
        if trial is None or worker_lock is None:
            if not orphans:
                return training.SUCCESS
            if not reported:
                logger.info("waiting for the runs of trials %s, whose sweep was killed", ", ".join(map(str, orphans)))
                reported = True
            time.sleep(_WAIT_SECONDS)
            continue
        try:
            status = _run_trial(study, trial, plan, workdir)
        finally:
            worker_lock.__exit__()
        if status:
            return status


def _take_trial(
    study: optuna.Study, plan: Plan, workdir: epath.Path
) -> tuple[optuna.Trial | None, workdirs.Lock | None, list[int]]:
    """A trial to run, and the lock to hold meanwhile: one whose process has died, else a new one.

    Also the numbers of trials without a sweep process whose run goes on nevertheless.
    """
    trials, orphans = study.get_trials(deepcopy=False), []
    for frozen in trials:
        if frozen.state != TrialState.RUNNING:
            continue
        folder = trial_folder(workdir, frozen.number)
        if _is_held(folder, _WORKER_LOCK):
            continue
        if _is_held(folder, workdirs.LOCK):
            orphans.append(frozen.number)
            continue
        logger.info("trial %d: resumed, its process ended", frozen.number)
        return optuna.Trial(study, frozen._trial_id), workdirs.Lock(folder, primary=True, name=_WORKER_LOCK), orphans
    if len(trials) >= plan.num_trials:
        return None, None, orphans
    # Two processes must not draw the same values, and a sweep of one process must repeat.
    study.sampler = _make_sampler(plan, len(trials))
    trial = study.ask()
    for each in plan.ranges:
        _suggest(trial, each)
    folder = trial_folder(workdir, trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    return trial, workdirs.Lock(folder, primary=True, name=_WORKER_LOCK), orphans


def _is_held(folder: epath.Path, name: str) -> bool:
    holder = workdirs.read_holder(folder, name)
    return holder is not None and holder.alive


def _make_sampler(plan: Plan, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial."""
    seed = (plan.seed * 1_000_003 + number) % (1 << 32)
    if plan.sampler == "tpe":
        return optuna.samplers.TPESampler(
            n_startup_trials=min(10, max(3, plan.num_trials // 3)), seed=seed, constant_liar=True
        )
    random = optuna.samplers.RandomSampler(seed=seed)
    if plan.sampler == "random":
        return random
    points = itertools.product(*(each.grid for each in plan.ranges))
    point = next(itertools.islice(points, number, None))
    fixed = dict(zip((each.field for each in plan.ranges), point, strict=True))
    return optuna.samplers.PartialFixedSampler(fixed, random)


def _suggest(trial: optuna.Trial, each: Range) -> None:
    if each.kind == "choice":
        trial.suggest_categorical(each.field, each.choices)
    elif each.kind == "int":
        trial.suggest_int(each.field, int(each.low), int(each.high), step=each.step)
    else:
        trial.suggest_float(each.field, each.low, each.high, log=each.kind == "log")


def _run_trial(study: optuna.Study, trial: optuna.Trial, plan: Plan, workdir: epath.Path) -> int:
    """Train one trial and tell the study how it ended. Returns 0, or 85 as `run_trials` does."""
    for each in plan.ranges:
        _suggest(trial, each)  # where the process died before it had drawn all
    overrides = space.write_overrides(plan.ranges, trial.params)
    folder = trial_folder(workdir, trial.number)
    logger.info("trial %d of %d: %s", trial.number, plan.num_trials, training.quote_flags(overrides))
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    problem = ""

    def should_prune() -> bool:
        nonlocal problem
        try:
            scores = training.read_scores(folder, plan.metric)
        except UserError as error:
            problem = str(error)
            return True
        new = {step: value for step, value in scores.items() if step not in reported and math.isfinite(value)}
        for step, value in new.items():
            reported.add(step)
            trial.report(value, step)
            logger.info("  trial %d, step %d: %s %.4f", trial.number, step, plan.metric, value)
        return bool(new) and trial.should_prune()

    outcome = training.run(plan.command(overrides, folder), folder, should_prune)
    if outcome.status == training.PREEMPTED and not outcome.was_stopped:
        logger.info("trial %d was asked to stop from outside: rerun the same command to resume it", trial.number)
        return outcome.status
    if outcome.was_stopped and not problem and outcome.status != training.SUCCESS:
        study.tell(trial, state=TrialState.PRUNED)
        logger.info("trial %d: pruned, worse than the median at its last evaluation", trial.number)
        return 0
    score = math.nan
    if not problem and outcome.status == training.SUCCESS:
        problem, score = _read_final_score(folder, plan)
    problem = problem or outcome.error
    if problem or not math.isfinite(score):
        trial.set_user_attr("error", problem or f"{plan.metric} is not a number")
        study.tell(trial, state=TrialState.FAIL)
        logger.info("trial %d: failed: %s (%s)", trial.number, trial.user_attrs["error"], folder / training.LOG)
    else:
        study.tell(trial, score)
        logger.info("trial %d: %s %.4f after %.0f s", trial.number, plan.metric, score, outcome.seconds)
    return 0


def _read_final_score(folder: epath.Path, plan: Plan) -> tuple[str, float]:
    """(why there is none, the score of a run that ended)."""
    try:
        scores = training.read_scores(folder, plan.metric)
    except UserError as error:
        return str(error), math.nan
    if not scores:
        return "the validation split is empty, so there is no score; raise data.split.validation", math.nan
    return "", training.find_score(scores, plan.metric, keeps_best=plan.keeps_best)


def list_results(plan: Plan, workdir: epath.Path) -> list[TrialResult]:
    """All trials, in order."""
    trials = open_study(plan, workdir).get_trials(deepcopy=False)
    return [_make_result(trial, plan, trial_folder(workdir, trial.number)) for trial in trials]


def rank(trials: Sequence[TrialResult], metric: str) -> list[TrialResult]:
    """Complete trials from the best one on, then pruned ones likewise, then the others by number."""
    sign = 1 if results.is_eval_metric_lower_better(metric) else -1
    order = {"complete": 0, "pruned": 1}

    def key(trial: TrialResult) -> tuple[int, float, int]:
        scored = trial.score is not None and trial.state in order
        return order.get(trial.state, 2), sign * (trial.score or 0.0) if scored else 0.0, trial.number

    return sorted(trials, key=key)


def find_winner(trials: Sequence[TrialResult], metric: str) -> TrialResult | None:
    """The complete trial with the best score, the first one of equals."""
    complete = (trial for trial in rank(trials, metric) if trial.state == "complete" and trial.score is not None)
    return next(complete, None)


def _make_result(trial: FrozenTrial, plan: Plan, folder: epath.Path) -> TrialResult:
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    curve = [(float(step), value) for step, value in sorted(trial.intermediate_values.items())]
    score = trial.value if trial.state == TrialState.COMPLETE else None
    if trial.state == TrialState.PRUNED and curve:
        score = curve[-1][1]
    return TrialResult(
        number=trial.number,
        state=names.get(trial.state, "running"),
        overrides=space.write_overrides(plan.ranges, trial.params),
        score=score,
        seconds=training.read_seconds(folder),
        error=str(trial.user_attrs.get("error", "")),
        curve=curve,
    )
