"""`llmjax sweep`: train a config with many values of some fields, and find the best."""

import logging
import os

from llmjax.cli.flags import CONFIG, int_range, make_parser, parse, parse_workdir
from llmjax.errors import UserError

logger = logging.getLogger(__name__)


def sweep(arguments: list[str]) -> int:
    """Search config fields."""
    parser = make_parser(
        "sweep",
        """\
        Train a config with many values of some fields, and find those with the best validation score (eval.metric).
        Each trial is a run of its own in WORKDIR/trials, as a process; all share one token store. A trial that fails
        does not end the sweep. With eval.every, a trial is stopped once it is worse than the median of the others.
        Where `llmjax import` put parameters into WORKDIR, each trial starts from them.

        Ranges: log(LOW,HIGH) and uniform(LOW,HIGH) of numbers, int(LOW,HIGH[,STEP]), choice(A,B,...).

        The same command in further shells, machines or tasks of a Slurm array joins the sweep. A sweep that was stopped
        or killed is resumed by the same command, or by --workdir alone; more --trials extend it.""",
        "llmjax sweep --config=quickstart --workdir=runs/sweep --over='optimizer.learning_rate=log(1e-3,3e-2)' "
        "--over='model.num_layers=int(2,6)' --trials=12",
    )
    parser.add_argument("--config", metavar="NAME[:SIZE]", help=CONFIG.replace("config.json", "that of the sweep"))
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the sweep's files go")
    parser.add_argument("--over", action="append", default=[], metavar="FIELD=RANGE", help="a field that varies")
    parser.add_argument("--trials", type=int_range(1), help="trials of all processes together (default 12)")
    parser.add_argument("--sampler", choices=("tpe", "random", "grid"), help="how values are chosen (default tpe)")
    parser.add_argument("--prune", choices=("median", "none"), help="default: median, where eval.every is set")
    parser.add_argument("--seed", type=int_range(0, 2**31), help="of the sampler (default 0)")
    flags, overrides = parse(parser, arguments)
    workdir = parse_workdir(flags.workdir)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("llmjax sweep needs Optuna: run `pip install 'llmjax[sweep]'`") from None
    from llmjax.sweep import page, settings as sweep_settings, study, training

    settings = sweep_settings.resolve_settings(
        workdir,
        config=flags.config,
        over=flags.over,
        overrides=overrides,
        sampler=flags.sampler,
        prune=flags.prune,
        seed=flags.seed,
        trials=flags.trials,
    )
    settings, plan = sweep_settings.make_plan(settings, workdir)
    pruning = f"pruned by the {plan.pruner}" if plan.pruner != "none" else "not pruned"
    logger.info("sweep: %d trials, sampler %s, %s, by %s", plan.num_trials, plan.sampler, pruning, plan.metric)
    status = study.run_trials(plan, workdir)
    trials = study.list_results(plan, workdir)
    winner = study.find_winner(trials, plan.metric)
    paste = training.quote_flags(winner.overrides) if winner else ""
    path = workdir / "sweep.html"
    title = f"Sweep of {os.path.basename(settings.config)}"
    page.write_page(path, title=title, metric=plan.metric, ranges=plan.ranges, trials=trials, paste=paste)
    logger.info("\n%s", "\n".join(page.describe_table(plan.ranges, trials, plan.metric)))
    logger.info("\nreport: %s", path)
    if status:
        return status
    if running := sum(trial.state == "running" for trial in trials):
        logger.info("%d trials still run in other processes; the last of them writes the final report", running)
    if winner is None:
        if not running:
            logger.info("no trial is complete: read %s", study.trial_folder(workdir, 0) / training.LOG)
        return 0 if running else 1
    logger.info("best %s %.4f, trial %d, as overrides:\n  %s", plan.metric, winner.score, winner.number, paste)
    logger.info("next:   llmjax eval --workdir=%s --split=test", study.trial_folder(workdir, winner.number))
    return 0
