"""`llmjax fill`: predict masked tokens with a checkpoint."""

import logging
import sys

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir

logger = logging.getLogger(__name__)


def fill(arguments: list[str]) -> int:
    """Fill masks."""
    parser = make_parser(
        "fill",
        """\
        Predict the token behind each mask of a text, the most probable first, with a checkpoint that was trained with
        objective.name='masked'. Write a mask as [MASK], or as the tokenizer names it. It represents one token; a space
        before it is part of that token. Predictions are printed on stdout, everything else on stderr.""",
        "llmjax fill --workdir=runs/bert --text='import [MASK] as np' --count=3",
        job=True,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--text", action="append", required=True, help="text with masks; may be given several times")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--count", type=int_range(1), default=5, help="tokens to print for each mask (default 5)")
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.inference import fill_mask
    from llmjax.parallel import hosts
    from llmjax.run import next_commands

    with loading.load(parse_workdir(flags.workdir), step=flags.step, overrides=overrides) as loaded:
        predictions = fill_mask.fill(loaded, flags.text, flags.count)
    if hosts.is_primary():
        for text, masks in zip(flags.text, predictions, strict=True):
            print(text)
            for number, candidates in enumerate(masks, 1):
                if len(masks) > 1:
                    print(f" mask {number}")
                for candidate in candidates:
                    print(f"  {candidate.probability:6.1%}  {candidate.text!r}")
        sys.stdout.flush()
    logger.info("\nstep %d (%s)", loaded.step, loaded.params_name)
    logger.info("next: %s", next_commands.score_model(flags.workdir, loaded.store))
    return 0
