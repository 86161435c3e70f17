"""`llmjax train`: train a model, or resume a run."""

from llmjax.cli.flags import CONFIG, make_parser, parse, parse_workdir, say
from llmjax.cli.prepare import log_to_stdout


def train(arguments: list[str]) -> int:
    """Train, or resume."""
    parser = make_parser(
        "train",
        """\
        Train a model: the token store is prepared first where it is missing, and a workdir that holds a checkpoint is
        resumed from its newest good one; --config and overrides need not be repeated then. Ends with an evaluation,
        samples and report.html.
        For several processes on one machine: launch/local.py --processes=2 --devices=4 -- llmjax train ...""",
        "llmjax train --config=quickstart --workdir=runs/mine --config.train.steps=500",
    )
    parser.add_argument("--config", metavar="FILE[:SIZE]", help=CONFIG)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run's files go")
    flags, overrides = parse(parser, arguments)
    log_to_stdout()
    from llmjax.parallel import hosts
    from llmjax.run import loading

    said: list[str] = []
    config = loading.resolve(flags.config, parse_workdir(flags.workdir), overrides, said.append)
    hosts.initialize(config.parallel.cpu_threads)
    for line in said:  # who is primary is known from here on
        say(line)
    from llmjax.train import loop

    return loop.train(config, parse_workdir(flags.workdir), say)
