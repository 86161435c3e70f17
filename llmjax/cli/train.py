"""`llmjax train`: train a model, or resume a run."""

from llmjax.cli.flags import CONFIG, make_parser, parse, parse_workdir


def train(arguments: list[str]) -> int:
    """Train, or resume."""
    parser = make_parser(
        "train",
        """\
        Train a model. The token store is prepared first if it is missing. A workdir with checkpoints is resumed from
        its newest good one; --config and overrides need not be repeated then. Training ends with an evaluation, samples
        and report.html.
        For several processes on one machine: launch/local.py --processes=2 --devices=4 -- llmjax train ...""",
        "llmjax train --config=quickstart --workdir=runs/mine --config.train.steps=500",
        job=True,
    )
    parser.add_argument("--config", metavar="NAME[:SIZE]", help=CONFIG)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run's files go")
    flags, overrides = parse(parser, arguments)
    from llmjax.parallel import hosts
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    config = loading.resolve(flags.config, workdir, overrides)
    hosts.initialize(config.parallel.cpu_threads)
    loading.log_config_source(flags.config, workdir)
    from llmjax.train import loop

    return loop.train(config, workdir)
