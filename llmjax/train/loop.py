"""The training loop: set-up, data, model, resume, steps, finish."""

from collections.abc import Callable
import functools

from etils import epath

from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import TrainData
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.evals.harness import Evaluator
from llmjax.inference import sampling
from llmjax.metrics import MetricsLog
from llmjax.optim import schedules
from llmjax.parallel import backends, compilation_cache, hosts, mesh as meshes
from llmjax.run import config as run_config, loading, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.train import finish, record, resume
from llmjax.train.context import Progress, TrainContext
from llmjax.train.logger import MetricsLogger
from llmjax.train.preemption import Preemption
from llmjax.train.profiling import Profiler, check_profile
from llmjax.train.step import make_loss, train_step
from llmjax.train.store import prepare_once
from llmjax.train.wandb_run import check_wandb, start_wandb

DONE, DIVERGED, PREEMPTED = 0, 76, 85


def train(config: RunConfig, workdir: epath.Path, say: Callable[[str], None]) -> int:
    """Train to train.stop_at (or train.steps), from the newest checkpoint of `workdir`. Returns the exit status."""
    # place: every cheap check comes before anything is written
    mesh = meshes.make_mesh(config.mesh)
    backends.check_backend(config.parallel, mesh)
    backends.check_batch("train.global_batch", config.train.global_batch, mesh, config.train.accumulation)
    config.model.check(seq_len=config.data.seq_len, tensor=mesh.shape["tensor"])
    schedules.make_schedule(config.optimizer, config.train.steps)
    check_profile(config.train, workdir)
    check_wandb(config.train)
    workdir.mkdir(parents=True, exist_ok=True)
    with workdirs.Lock(workdir, primary=hosts.is_primary()) as lock:
        folder = config.train.compilation_cache or str(workdir / "compilation_cache")
        compilation_cache.enable(folder, config.parallel.cpu_threads)

        # data
        store = loading.store_folder(config, workdir)
        prepare_once(config, store, say)
        tokenizer = load_tokenizer(store)
        objective = run_config.objective(config, tokenizer)
        config = run_config.with_objective(config, objective)
        sampling.check_samples(config.sample, model=config.model, tokenizer=tokenizer, objective=objective)
        hosts.all_equal("config", str(config))
        data = TrainData(
            store, config.data, seed=config.seed, global_batch=config.train.global_batch, objective=objective
        )

        # model
        say("setting up the model")
        rules = config.parallel.rules
        spec = states.make_state_spec(
            config.model, config.optimizer, horizon=config.train.steps, mesh=mesh, rules=rules
        )
        unsharded = states.unsharded_params(spec, mesh, rules)
        for line in unsharded:
            say(f"  unsharded: {line}")

        # start
        kept = config.checkpoint
        checkpoints = Checkpoints(
            workdir / workdirs.CHECKPOINTS,
            keep=kept.keep,
            keep_every=kept.keep_every,
            timeout_seconds=kept.timeout_seconds,
        )
        progress = resume.restore_or_init(config, spec, data, checkpoints, tokenizer.sha256, say)
        evaluator = Evaluator(spec.graph, config, mesh, store)
        log = MetricsLog(workdir, primary=hosts.is_primary(), resume_step=progress.step)
        context = TrainContext(
            config, workdir, store, mesh, spec, data, tokenizer, checkpoints, evaluator, log, lock, say
        )
        record.write_run_metadata(context, progress, unsharded)
        start_wandb(context)

        # steps
        status, stop = DONE, config.train.stop_at or config.train.steps
        left = data.remaining(progress.data_state)
        if left is not None and left < stop - progress.step:
            raise UserError(
                f"train.steps={config.train.steps}: the data end after {left} more steps; lower it, or set "
                "data.at_source_end='repeat'"
            )
        if progress.step < stop:
            say(f"training from step {progress.step} to {stop}: {record.run_summary(context)}")
            if config.data.skip:
                say(f"  left out by data.skip: samples {', '.join(f'{a}..{b - 1}' for a, b in config.data.skip)}")
            status = run_steps(context, progress, stop)
        else:
            say(f"step {progress.step} of {stop} is done: nothing left to train")
            if config.train.stop_at and stop < config.train.steps:
                say(f"  train.stop_at={stop}: set --config.train.stop_at=0 to train to step {config.train.steps}")
        checkpoints.close()
        data.close()

        # finish
        if status == DONE:
            lock.check()
            finish.write_final_report(context, progress)
        log.close()
    return status


def run_steps(context: TrainContext, progress: Progress, stop: int) -> int:
    """Step until `stop`, logging, saving and evaluating on the way; `progress` moves along. Returns the exit status."""
    config = context.config
    rows = hosts.local_rows(backends.batch_sharding(context.mesh), config.train.global_batch)
    loss = make_loss(context.spec.graph, seed=config.seed, chunk=config.train.loss_chunk, z_loss=config.train.z_loss)
    step_function = functools.partial(
        train_step, loss=loss, optimizer=context.spec.optimizer, accumulation=config.train.accumulation
    )
    compiled = backends.compile_step(
        step_function, config.parallel, context.mesh, context.spec.shardings, rows, config.train.global_batch
    )
    logger = MetricsLogger(context, stop, progress)
    profiler = Profiler(config.train, context.workdir, progress.step + 1, logger.say)
    step = progress.step
    preemption = Preemption(lambda: _describe_loss(step, context.checkpoints.latest()))
    state, batches, status = compiled.shard_state(progress.state), context.data.batches(progress.data_state, rows), DONE
    try:
        for step in range(progress.step + 1, stop + 1):
            profiler.before_step(step, state)
            with logger.data_timer():
                local, data_state = next(batches)
            state, metrics = compiled.step(state, compiled.shard_batch(local))
            logger.record(step, metrics)
            profiler.after_step(step, state)

            due = step == stop or step % config.checkpoint.every == 0
            evaluate = config.eval.every and step % config.eval.every == 0 and step < stop
            asked = preemption.reached(step)
            if due or evaluate or asked or logger.diverged:
                logger.flush()
                progress.step, progress.tokens = step, logger.tokens
                progress.state, progress.data_state = compiled.unshard_state(state), data_state
                if due or asked:
                    context.save(progress)
                if evaluate:
                    logger.close()  # a long evaluation has lines of its own
                    with preemption.interruptible():
                        logger.log_eval(context.evaluate(step, progress.state, "validation"))
                    if preemption.interrupted and not (due or asked):
                        context.save(progress)
                    asked |= preemption.interrupted
            if logger.diverged or asked:
                status = DIVERGED if logger.diverged else PREEMPTED
                context.checkpoints.wait()  # a second signal meanwhile says what is lost
                break
    finally:
        profiler.close()
        preemption.close()
        logger.close()
    if status == DIVERGED:
        context.say(
            f"stopping: {config.train.max_skipped} steps in a row were not finite; the newest checkpoint is kept"
        )
    if status == PREEMPTED:
        context.say(f"asked to stop: step {progress.step} is saved; rerun the same command to resume")
    return status


def _describe_loss(step: int, newest: int | None) -> str:
    """What ending now loses, after `step` was run and `newest` is the newest complete checkpoint."""
    if newest is not None and newest >= step:
        return "nothing is lost"
    return f"steps {(newest or 0) + 1} to {step} are lost" if step else "no step was finished"
