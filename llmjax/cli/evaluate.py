"""`llmjax eval`: score a checkpoint on a split."""

import logging

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir

logger = logging.getLogger(__name__)


def evaluate(arguments: list[str]) -> int:
    """Score a checkpoint."""
    parser = make_parser(
        "eval",
        """\
        Score a checkpoint on a split: loss, perplexity and accuracy over every document, by source. For the objective
        causal also bits per byte of the original text, for others the accuracy of a majority-class baseline. Writes
        WORKDIR/eval/<step>/<split>.json. The scores do not depend on the mesh.""",
        "llmjax eval --workdir=runs/mine --split=test",
        job=True,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    splits = ("train", "validation", "test")
    parser.add_argument("--split", default="validation", choices=splits, help="documents to score (default validation)")
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    from llmjax import report
    from llmjax.evals import harness
    from llmjax.parallel import hosts
    from llmjax.run import next_commands

    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        path = harness.evaluate(workdir, loaded, flags.split)
    if hosts.is_primary():
        logger.info("written to %s\nreport: %s", path, report.write_report(workdir))
    logger.info("next: %s", next_commands.use_model(flags.workdir, loaded.config.objective.name))
    return 0
