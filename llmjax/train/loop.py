"""The training loop: set-up, data, model, resume, steps, finish."""

import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import time
from typing import Any

from etils import epath
import jax

from llmjax.batch import Graph
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.order import Skips
from llmjax.data.batches.pipeline import TrainData
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.evals.harness import Evaluator
from llmjax.evals.reference import Reference, compute_reference, read_reference
from llmjax.evals.tasks.run import TaskScorer
from llmjax.inference import generate
from llmjax.inference.embed import with_pooling
from llmjax.metrics import MetricsLog
from llmjax.parallel import axes, backends, compilation_cache, hosts, mesh as meshes
from llmjax.parallel.backends import CompiledStep
from llmjax.parallel.watchdog import Watchdog
from llmjax.run import (
    config as run_config,
    loading,
    phases as run_phases,
    state as states,
    teacher as teachers,
    workdir as workdirs,
)
from llmjax.run.config import RunConfig
from llmjax.run.mesh_choice import choose_mesh
from llmjax.train import best, finish, recompute, record, resume
from llmjax.train.cloud_notice import CloudNotice, check_notice
from llmjax.train.context import Progress, TrainContext
from llmjax.train.logger import MetricsLogger
from llmjax.train.phases import (
    TrainPhase,
    check_length,
    open_data,
    open_objectives,
    open_phases,
    phase_of,
    read_batches,
)
from llmjax.train.preemption import Preemption
from llmjax.train.profiling import Profiler, check_profile
from llmjax.train.program import check_program, make_program
from llmjax.train.remat import resolve_remat
from llmjax.train.store import prepare_once
from llmjax.train.teacher import load_teacher, open_teacher
from llmjax.train.wandb_run import check_wandb, start_wandb

logger = logging.getLogger(__name__)

SUCCESS, DIVERGED, PREEMPTED = 0, 76, 85  # exit statuses


def train(config: RunConfig, workdir: epath.Path) -> int:
    """Train to train.stop_at (or train.steps), from the newest checkpoint of `workdir`. Returns the exit status."""
    config = with_pooling(loading.with_finetuning_rate(config, workdir), workdir)
    # The record of the run has the choice: a resumed run has the same mesh.
    config = dataclasses.replace(
        config, mesh=choose_mesh(config, jax.devices(), frozen_bytes=teachers.teacher_bytes(config))
    )
    mesh = meshes.make_mesh(config.mesh)
    with axes.use_mesh(mesh, config.parallel.rules, config.parallel.gradient_dtype):
        _check_config(config, workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        with (
            Watchdog(config.watchdog, config.checkpoint.timeout_seconds) as watchdog,
            workdirs.Lock(workdir, primary=hosts.is_primary()) as lock,
        ):
            folder = config.train.compilation_cache or str(workdir / workdirs.COMPILATION_CACHE)
            compilation_cache.enable(folder, config.parallel.cpu_threads)
            context, progress = _set_up(config, workdir, lock, watchdog)
            status = SUCCESS
            if progress.step < context.last_step and not context.should_stop_early(progress):
                status = _run_to_last_step(context, progress)
            else:
                _log_nothing_left(context, progress)
            watchdog.enter("save", progress.step)
            context.checkpoints.close()
            for phase in context.phases:
                phase.data.close()
            if status == SUCCESS:
                lock.check()
                finish.write_final_report(context, progress)
            context.log.close()
            return status


def _check_config(config: RunConfig, workdir: epath.Path) -> None:
    """All checks that are cheap, before anything is written."""
    for phase in run_phases.split(config):
        with run_phases.naming_phase(phase.name):
            check_program(phase.steps)
    Skips(config.data.skip)
    if not config.train.epochs:  # else the steps are not known before the data
        run_phases.check_rates(config)
    recompute.check(config)
    check_profile(config.train, workdir)
    check_wandb(config.train)
    check_notice(config.train.preemption_notice)
    TaskScorer(config).check_files()


def _set_up(
    config: RunConfig, workdir: epath.Path, lock: workdirs.Lock, watchdog: Watchdog
) -> tuple[TrainContext, Progress]:
    """Prepare the store, open the data, set up the model, restore the newest checkpoint or initialise."""
    started = time.time()
    store = loading.store_folder(config, workdir)
    manifest = prepare_once(config, store)
    tokenizer = load_tokenizer(store)
    objectives = open_objectives(config, tokenizer)
    for of_rows in objectives.values():
        backends.check_length("objective.target_len", of_rows.target_len)
    config = run_config.with_objective(config, max(objectives.values(), key=lambda each: each.min_vocab_size))
    objective = objectives[max(objectives)]  # of the last phase
    tasks = TaskScorer(config)
    tasks.check_template(workdir, store, tokenizer)
    generate.check_samples(config.sample, config.model, tokenizer, objective)
    hosts.all_equal("config", str(config))
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, config.checkpoint)
    resumes = (checkpoints.latest() or 0) > 0
    teacher = open_teacher(config, workdir, tokenizer, objective, resumes=resumes)
    watchdog.enter("compile", 0)
    config, remat_reason = resolve_remat(config, workdir, resumes=resumes)
    watchdog.enter("setup", 0)
    data = open_data(config, objectives, store)
    config = _with_steps_of_epochs(config, data[0])

    logger.info("setting up the model")
    watchdog.enter("compile", 0)
    phases = run_phases.split(config)
    spec = states.make_state_spec(config.model, config.optimizer, horizon=phases[0].rates.horizon)
    unsharded = states.unsharded_params(spec)
    for line in unsharded:
        logger.info("  unsharded: %s", line)
    if checkpoints.latest() is not None:
        watchdog.enter("restore", 0)
    progress = resume.restore_or_init(config, spec, data, checkpoints, tokenizer.sha256)
    if teacher is not None:
        watchdog.enter("restore", progress.step)
        spec = teachers.add_teacher(spec, teacher.config)
        params = load_teacher(teacher, max((p.config for p in phases), key=lambda c: c.data.seq_len), tokenizer, store)
        progress.state = dataclasses.replace(progress.state, teacher=params)
    watchdog.enter("compile", progress.step)
    reference = None
    if objective.name == "dpo":
        reference = _find_reference(config, workdir, spec.graph, progress, objective, store, manifest, watchdog)
        data[0].add_reference(reference)
    record.write_last_end(workdir)  # before lines of the metrics that this start repeats are removed
    context = TrainContext(
        config=config,
        workdir=workdir,
        manifest=manifest,
        tokenizer=tokenizer,
        objective=objective,
        phases=open_phases(config, objectives, data, spec),
        spec=spec,
        checkpoints=checkpoints,
        evaluator=Evaluator(spec.graph, phases[-1].config, objective, store, manifest, reference),
        log=MetricsLog(workdir, primary=hosts.is_primary(), resume_step=progress.step),
        lock=lock,
        watchdog=watchdog,
        tasks=tasks,
        started=started,
        teacher=teacher,
        remat_reason=remat_reason,
    )
    record.write_run_metadata(context, progress, unsharded)
    start_wandb(context)
    return context, progress


def _find_reference(
    config: RunConfig,
    workdir: epath.Path,
    graph: Graph,
    progress: Progress,
    objective: Objective,
    store: pathlib.Path,
    manifest: dict[str, Any],
    watchdog: Watchdog,
) -> Reference:
    """The log-likelihoods under the parameters of step 0: computed there, and read by a run that goes on."""
    if progress.step:
        return read_reference(config, manifest, workdir)
    phases = itertools.chain(["compile"], itertools.repeat("eval"))  # the first batch compiles
    return compute_reference(
        graph,
        progress.state.params,
        config,
        objective,
        store,
        manifest,
        workdir,
        enter=lambda: watchdog.enter(next(phases), 0),
    )


def _with_steps_of_epochs(config: RunConfig, data: TrainData) -> RunConfig:
    """The config with train.steps filled in where train.epochs decides it."""
    epochs, batch = config.train.epochs, config.train.global_batch
    if not epochs:
        return config
    steps = max(1, math.ceil(epochs * data.rows / batch))
    logger.info("train.epochs=%g: %d steps, %d rows an epoch and %d a step", epochs, steps, data.rows, batch)
    config = run_config.with_fields(config, [("train.steps", steps)])
    if config.train.stop_at > steps:
        raise UserError(f"train.stop_at={config.train.stop_at} is beyond the {steps} steps of train.epochs: lower it")
    run_phases.check_rates(config)
    return config


def _run_to_last_step(context: TrainContext, progress: Progress) -> int:
    config = context.config
    check_length(context.phases, progress.step, context.last_step, progress.data_state)
    summary = record.run_summary(context)
    if attention := run_config.choose_attention(config):
        logger.info("attention: %s", attention)
    logger.info("training from step %d to %d: %s", progress.step, context.last_step, summary)
    for phase in context.phases if config.phases else ():
        if progress.step < phase.phase.last:
            logger.info("  %s", phase.phase)
    if config.data.skip:
        skipped = ", ".join(f"{start}..{stop - 1}" for start, stop in config.data.skip)
        logger.info("  data.skip leaves out samples %s", skipped)
    with CloudNotice(config.train.preemption_notice):
        status = run_steps(context, progress)
    if status == DIVERGED:
        logger.info(
            "diverged: %d steps in a row were not finite, or their loss was more than train.max_loss_rise=%g above the "
            "best; the checkpoints are kept. docs/running.md says how to go back to one of them",
            config.train.max_skipped,
            config.train.max_loss_rise,
        )
    if status == PREEMPTED:
        logger.info("stop requested: step %d is saved; rerun the same command to resume", progress.step)
    return status


def _log_nothing_left(context: TrainContext, progress: Progress) -> None:
    train, last = context.config.train, context.last_step
    if progress.step < last:
        logger.info("step %d: eval.stop_after=%d ended training", progress.step, context.config.eval.stop_after)
        return
    logger.info("step %d of %d is done: nothing left to train", last, last)
    if train.stop_at and train.stop_at < train.steps:
        logger.info("  train.stop_at=%d: set --config.train.stop_at=0 to train to step %d", train.stop_at, train.steps)


def run_steps(context: TrainContext, progress: Progress) -> int:
    """Step to the last step; log, save and evaluate on the way. Updates `progress`; returns the exit status."""
    config, stop, watchdog = context.config, context.last_step, context.watchdog
    rows_of = functools.partial(hosts.local_rows, backends.batch_sharding())
    programs: dict[tuple, CompiledStep] = {}

    def program_of(phase: TrainPhase, size: int) -> CompiledStep:
        """The compiled step; those of all phases and sizes take and return the same state."""
        if (key := (*phase.program, size)) not in programs:
            spec = dataclasses.replace(context.spec, optimizer=phase.optimizer)
            programs[key] = make_program(phase.phase.config, spec, rows_of(size), size)
        return programs[key]

    phase, size = phase_of(context.phases, progress.step + 1), progress.data_state.global_batch
    compiled = program_of(phase, size)
    metrics_logger = MetricsLogger(context, progress)
    first = progress.step + 1
    profiler = Profiler(config.train, context.workdir, first)
    preemption = Preemption()
    try:
        compares = config.eval.stop_after or config.checkpoint.keep_best
        was_skipped = _is_evaluated(context, progress.step) and progress.step not in progress.evaluations
        # The last process stopped here, and the scores decide on the rest.
        if compares and progress.step and was_skipped:
            if not _evaluate(context, progress, metrics_logger, preemption):
                return PREEMPTED
            if context.should_stop_early(progress):
                return SUCCESS
        state = compiled.shard_state(progress.state)
        batches = read_batches(context.phases, progress.step, progress.data_state, rows_of)
        for step in range(first, stop + 1):
            profiler.before_step(step, state)
            watchdog.enter("data" if step > first else "compile", step)  # the first batch starts the workers
            with metrics_logger.data_timer():
                previous = phase
                phase, local, data_state = next(batches)
            if phase is not previous:
                metrics_logger.flush()
                logger.info("%s", phase.phase)
            compiles = step == first or data_state.global_batch != size or phase.program != previous.program
            recomputes = bool(config.train.recompute_every) and step % config.train.recompute_every == 0
            if compiles:
                size = data_state.global_batch
                compiled = program_of(phase, size)
                watchdog.forget_steps()
            # The comparison of the first step that is computed twice compiles, too.
            watchdog.enter("compile" if compiles or recomputes else "step", step)
            compute = functools.partial(recompute.step_twice, compiled, step=step) if recomputes else compiled.step
            state, metrics = compute(state, compiled.shard_batch(local))
            metrics_logger.record(step, metrics, phase)
            watchdog.enter("profile", step)
            profiler.after_step(step, state)
            watchdog.enter("step", step)
            context.checkpoints.raise_failure()

            should_save = step == stop or step % config.checkpoint.every == 0
            should_evaluate = _is_evaluated(context, step)
            stopping, stops_early = preemption.reached(), False
            if should_save or should_evaluate or stopping or metrics_logger.diverged:
                metrics_logger.flush()
                progress.step, progress.total_targets = step, metrics_logger.total_targets
                progress.best_loss = metrics_logger.best_loss
                progress.state, progress.data_state = compiled.unshard_state(state), data_state
                if should_evaluate and not stopping:
                    # Before the checkpoint, which holds the scores. A signal ends the evaluation.
                    stopping = not _evaluate(context, progress, metrics_logger, preemption)
                    stops_early = context.should_stop_early(progress)
                    is_best = config.checkpoint.keep_best and context.best_step(progress) == step
                    should_save |= stops_early or is_best
                if should_save or stopping:
                    context.save(progress)
            if stops_early:
                break
            if metrics_logger.diverged or stopping:
                watchdog.enter("save", step)
                context.checkpoints.wait()
                return DIVERGED if metrics_logger.diverged else PREEMPTED
    except jax.errors.JaxRuntimeError:
        # Another process may have learned of a failed save one step earlier, and its end broke a collective.
        context.checkpoints.raise_failure()
        raise
    finally:
        profiler.close()
        if not preemption.agreed:  # else further signals must not change the exit status
            preemption.close()
    return SUCCESS


def _is_evaluated(context: TrainContext, step: int) -> bool:
    """Whether the validation split is scored at a step, before the end."""
    every = context.config.eval.every
    return bool(every) and step % every == 0 and step < context.last_step


def _evaluate(context: TrainContext, progress: Progress, metrics_logger: MetricsLogger, preemption: Preemption) -> bool:
    """Score the validation split and add the scores to `progress`; False where a signal ended it."""
    scores = context.evaluate(progress.step, progress.state, preemption)
    if scores is None:
        return False
    metrics_logger.log_eval(scores)
    config = context.config
    progress.evaluations[progress.step] = best.select_scores(scores, config.eval.metric)
    if context.should_stop_early(progress):
        logger.info(
            "stopping early at step %d: validation %s has not improved for %d evaluations; step %d is the best",
            progress.step,
            config.eval.metric,
            config.eval.stop_after,
            context.best_step(progress),
        )
    return True
