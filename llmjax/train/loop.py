"""The training loop: set-up, data, model, resume, steps, finish."""

import dataclasses
import logging

from etils import epath
import jax

from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import TrainData
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.evals.harness import Evaluator
from llmjax.inference import generate
from llmjax.metrics import MetricsLog
from llmjax.parallel import axes, backends, compilation_cache, hosts, mesh as meshes
from llmjax.run import config as run_config, loading, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.mesh_choice import choose_mesh
from llmjax.train import finish, record, resume
from llmjax.train.context import Progress, TrainContext
from llmjax.train.logger import MetricsLogger
from llmjax.train.preemption import Preemption
from llmjax.train.profiling import Profiler, check_profile
from llmjax.train.program import check_program, make_program
from llmjax.train.remat import resolve_remat
from llmjax.train.store import prepare_once
from llmjax.train.wandb_run import check_wandb, start_wandb

logger = logging.getLogger(__name__)

SUCCESS, DIVERGED, PREEMPTED = 0, 76, 85  # exit statuses


def train(config: RunConfig, workdir: epath.Path) -> int:
    """Train to train.stop_at (or train.steps), from the newest checkpoint of `workdir`. Returns the exit status."""
    # The record of the run has the choice: a resumed run has the same mesh.
    config = dataclasses.replace(config, mesh=choose_mesh(config, jax.devices()))
    mesh = meshes.make_mesh(config.mesh)
    with axes.use_mesh(mesh, config.parallel.rules, config.parallel.gradient_dtype):
        _check_config(config, workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        with workdirs.Lock(workdir, primary=hosts.is_primary()) as lock:
            folder = config.train.compilation_cache or str(workdir / workdirs.COMPILATION_CACHE)
            compilation_cache.enable(folder, config.parallel.cpu_threads)
            context, progress = _set_up(config, workdir, lock)
            status = SUCCESS
            if progress.step < context.last_step:
                status = _run_to_last_step(context, progress)
            else:
                _log_nothing_left(context)
            context.checkpoints.close()
            context.data.close()
            if status == SUCCESS:
                lock.check()
                finish.write_final_report(context, progress)
            context.log.close()
            return status


def _check_config(config: RunConfig, workdir: epath.Path) -> None:
    """All checks that are cheap, before anything is written."""
    check_program(config)
    check_profile(config.train, workdir)
    check_wandb(config.train)


def _set_up(config: RunConfig, workdir: epath.Path, lock: workdirs.Lock) -> tuple[TrainContext, Progress]:
    """Prepare the store, open the data, set up the model, restore the newest checkpoint or initialise."""
    store = loading.store_folder(config, workdir)
    manifest = prepare_once(config, store)
    tokenizer = load_tokenizer(store)
    objective = run_config.objective(config, tokenizer)
    backends.check_length("objective.target_len", objective.target_len)
    config = run_config.with_objective(config, objective)
    generate.check_samples(config.sample, config.model, tokenizer, objective)
    hosts.all_equal("config", str(config))
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, config.checkpoint)
    config, remat_reason = resolve_remat(config, workdir, resumes=(checkpoints.latest() or 0) > 0)
    data = TrainData(store, config.data, seed=config.seed, global_batch=config.train.global_batch, objective=objective)

    logger.info("setting up the model")
    spec = states.make_state_spec(config.model, config.optimizer, horizon=config.train.steps)
    unsharded = states.unsharded_params(spec)
    for line in unsharded:
        logger.info("  unsharded: %s", line)
    progress = resume.restore_or_init(config, spec, data, checkpoints, tokenizer.sha256)
    context = TrainContext(
        config=config,
        workdir=workdir,
        manifest=manifest,
        tokenizer=tokenizer,
        objective=objective,
        data=data,
        spec=spec,
        checkpoints=checkpoints,
        evaluator=Evaluator(spec.graph, config, objective, store, manifest),
        log=MetricsLog(workdir, primary=hosts.is_primary(), resume_step=progress.step),
        lock=lock,
        remat_reason=remat_reason,
    )
    record.write_run_metadata(context, progress, unsharded)
    start_wandb(context)
    return context, progress


def _run_to_last_step(context: TrainContext, progress: Progress) -> int:
    config, steps_left = context.config, context.last_step - progress.step
    batches_left = context.data.remaining(progress.data_state)
    if batches_left is not None and batches_left < steps_left:
        raise UserError(
            f"train.steps={config.train.steps}: the data end after {batches_left} more steps; lower it, or set "
            "data.at_source_end='repeat'"
        )
    summary = record.run_summary(context)
    if attention := run_config.choose_attention(config):
        logger.info("attention: %s", attention)
    logger.info("training from step %d to %d: %s", progress.step, context.last_step, summary)
    if config.data.skip:
        skipped = ", ".join(f"{start}..{stop - 1}" for start, stop in config.data.skip)
        logger.info("  data.skip leaves out samples %s", skipped)
    status = run_steps(context, progress)
    if status == DIVERGED:
        count = config.train.max_skipped
        logger.info("stopping: %d steps in a row were not finite; the newest checkpoint is kept", count)
    if status == PREEMPTED:
        logger.info("stop requested: step %d is saved; rerun the same command to resume", progress.step)
    return status


def _log_nothing_left(context: TrainContext) -> None:
    train, last = context.config.train, context.last_step
    logger.info("step %d of %d is done: nothing left to train", last, last)
    if train.stop_at and train.stop_at < train.steps:
        logger.info("  train.stop_at=%d: set --config.train.stop_at=0 to train to step %d", train.stop_at, train.steps)


def run_steps(context: TrainContext, progress: Progress) -> int:
    """Step to the last step; log, save and evaluate on the way. Updates `progress`; returns the exit status."""
    config, stop = context.config, context.last_step
    rows = hosts.local_rows(backends.batch_sharding(), config.train.global_batch)
    compiled = make_program(config, context.spec, rows)
    metrics_logger = MetricsLogger(context, progress)
    profiler = Profiler(config.train, context.workdir, progress.step + 1)
    step = progress.step
    preemption = Preemption(lambda: _describe_loss(step, context.checkpoints.latest()))
    state, batches = compiled.shard_state(progress.state), context.data.batches(progress.data_state, rows)
    try:
        for step in range(progress.step + 1, stop + 1):
            profiler.before_step(step, state)
            with metrics_logger.data_timer():
                local, data_state = next(batches)
            state, metrics = compiled.step(state, compiled.shard_batch(local))
            metrics_logger.record(step, metrics)
            profiler.after_step(step, state)

            should_save = step == stop or step % config.checkpoint.every == 0
            should_evaluate = config.eval.every and step % config.eval.every == 0 and step < stop
            stopping = preemption.reached()
            if should_save or should_evaluate or stopping or metrics_logger.diverged:
                metrics_logger.flush()
                progress.step, progress.total_targets = step, metrics_logger.total_targets
                progress.state, progress.data_state = compiled.unshard_state(state), data_state
                if should_save or stopping:
                    context.save(progress)
                if should_evaluate and not stopping:
                    scores = context.evaluate(step, progress.state, preemption)
                    if scores is not None:
                        metrics_logger.log_eval(scores)
                    else:  # a signal ended the evaluation
                        stopping = True
                        if not should_save:
                            context.save(progress)
            if metrics_logger.diverged or stopping:
                context.checkpoints.wait()  # a second signal meanwhile prints what is lost
                return DIVERGED if metrics_logger.diverged else PREEMPTED
    finally:
        profiler.close()
        preemption.close()
    return SUCCESS


def _describe_loss(step: int, newest: int | None) -> str:
    """Which steps are lost if the process ends now, after `step`; `newest` is the newest complete checkpoint."""
    if newest is not None and newest >= step:
        return "nothing is lost"
    return f"steps {(newest or 0) + 1} to {step} are lost" if step else "no step was finished"
