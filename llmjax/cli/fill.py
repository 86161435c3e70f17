"""`llmjax fill`: predict masked tokens with a checkpoint."""

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir, say


def fill(arguments: list[str]) -> int:
    """Fill masks."""
    parser = make_parser(
        "fill",
        """\
        Say what belongs in the place of each mask of a text, the likeliest token first, with a checkpoint that was
        trained with objective.name='masked'. A mask is [MASK], or what the tokenizer calls it, and hides one token; a
        space before it is part of that token.""",
        "llmjax fill --workdir=runs/bert --text='import [MASK] as np' --count=3",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--text", action="append", required=True, help="text with masks; may be given several times")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--count", type=int_range(1), default=5, help="tokens to name for each mask (default 5)")
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.inference import fill_mask as filling

    loaded = loading.load(parse_workdir(flags.workdir), step=flags.step, overrides=overrides, say=say)
    filled = filling.fill(
        flags.text,
        graph=loaded.graph,
        params=loaded.params,
        model=loaded.config.model,
        mesh=loaded.mesh,
        rules=loaded.config.parallel.rules,
        tokenizer=loaded.tokenizer,
        count=flags.count,
    )
    for text, masks in zip(flags.text, filled, strict=True):
        say(text)
        for number, fillers in enumerate(masks, 1):
            if len(masks) > 1:
                say(f" mask {number}")
            for filler in fillers:
                say(f"  {filler.probability:6.1%}  {filler.text!r}")
    say(f"step {loaded.step} ({loaded.parameters})")
    return 0
