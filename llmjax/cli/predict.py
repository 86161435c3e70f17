"""`llmjax predict`: the label of each text of a file."""

import json
import logging
import pathlib

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir

logger = logging.getLogger(__name__)


def predict(arguments: list[str]) -> int:
    """Predict labels."""
    parser = make_parser(
        "predict",
        """\
        Write the label of each text of a JSON lines file, one object a line and in its order: a class and the
        probability of each, several classes, or a number, with a checkpoint that was trained with
        objective.name='classify' or 'regress'; with 'reward' the reward of the answer in --pair_field to the prompt in
        --field. A prediction does not depend on the other texts.""",
        "llmjax predict --workdir=runs/sentiment --input=texts.jsonl --output=labels.jsonl",
        job=True,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON lines, one object a line")
    parser.add_argument("--output", required=True, metavar="FILE", help="a new file, JSON lines")
    parser.add_argument("--field", default="text", help="the field with the text (default text)")
    parser.add_argument("--pair_field", default="", help="the field with the second text of a pair (default: none)")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    from llmjax import atomic
    from llmjax.errors import UserError
    from llmjax.inference import predict as prediction
    from llmjax.inference.text_batches import read_texts
    from llmjax.parallel import hosts

    source, output = (pathlib.Path(path).expanduser() for path in (flags.input, flags.output))
    if output.exists():
        raise UserError(f"--output={output}: already exists; give a new file")
    firsts = read_texts(source, flags.field)
    seconds = read_texts(source, flags.pair_field) if flags.pair_field else [None] * len(firsts)
    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        pairs = {bool(s.pair_field or s.chosen_field) for s in loaded.config.data.sources.values()}
        if pairs and (bool(flags.pair_field) not in pairs):
            problem = "trained on pairs: name" if not flags.pair_field else "trained on single texts: leave out"
            raise UserError(f"--pair_field={flags.pair_field}: the model was {problem} --pair_field")
        labels, cut = prediction.predict(loaded, list(zip(firsts, seconds, strict=True)))
    if hosts.is_primary():
        atomic.write_bytes(output, "".join(json.dumps(label) + "\n" for label in labels).encode())
    logger.info("%s: %d labels, of the %s of step %d", output, len(labels), loaded.params_name, loaded.step)
    if cut:
        logger.info("  note: %d texts were cut to data.seq_len=%d", cut, loaded.config.data.seq_len)
    return 0
