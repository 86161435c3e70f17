"""`llmjax eval`: score a checkpoint on a split."""

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir, say


def evaluate(arguments: list[str]) -> int:
    """Score a checkpoint."""
    parser = make_parser(
        "eval",
        """\
        Score a checkpoint on every document of a split, once each: loss, perplexity, accuracy, by source; and bits per
        byte over the original text (causal), or the accuracy of the majority-class baseline. Writes
        WORKDIR/eval/<step>/<split>.json. Any mesh will do.""",
        "llmjax eval --workdir=runs/mine --split=test",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    splits = ("train", "validation", "test")
    parser.add_argument("--split", default="validation", choices=splits, help="which documents (default validation)")
    flags, overrides = parse(parser, arguments)
    from llmjax.parallel import hosts
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax import report
    from llmjax.evals import harness

    path, _ = harness.evaluate(
        parse_workdir(flags.workdir), step=flags.step, split=flags.split, overrides=overrides, say=say
    )
    if hosts.is_primary():
        print(f"written to {path}\nreport: {report.write_report(parse_workdir(flags.workdir))}")
    if loading.read_config(parse_workdir(flags.workdir)).model.generates:
        say(f"next: llmjax generate --workdir={flags.workdir} --prompt='Once upon a time'")
    return 0
