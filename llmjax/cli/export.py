"""`llmjax export`: a checkpoint becomes a Hugging Face folder."""

import logging
import os
import pathlib

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir

logger = logging.getLogger(__name__)


def export(arguments: list[str]) -> int:
    """Write a checkpoint for transformers."""
    parser = make_parser(
        "export",
        """\
        Write a checkpoint as a folder that transformers loads with from_pretrained: config.json, model.safetensors or
        shards with their index, and the tokenizer. The class of transformers is chosen to fit the model; where none
        fits, the error names the field. The exported parameters are those that `llmjax eval` scores: an average where
        the optimizer keeps one.""",
        "llmjax export --workdir=runs/mine --to=exports/mine --dtype=bfloat16",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="on disk (default float32)")
    parser.add_argument(
        "--max_shard_bytes",
        type=int_range(1),
        default=5_000_000_000,
        help="largest size of a file (default 5,000,000,000)",
    )
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.interop import exporting

    exported = exporting.export(
        parse_workdir(flags.workdir),
        pathlib.Path(os.path.expanduser(flags.to)),
        step=flags.step,
        dtype=flags.dtype,
        max_shard_bytes=flags.max_shard_bytes,
        overrides=overrides,
    )
    name, gigabytes = exported.architecture, exported.nbytes / 1e9
    logger.info("written to %s: %s in %d file(s), %.2f GB", flags.to, name, len(exported.files), gigabytes)
    logger.info("tokenizer: %s", exported.tokenizer)
    loader = "AutoModelForCausalLM" if name.endswith(("CausalLM", "LMHeadModel")) else name
    logger.info("next: from transformers import %s; %s.from_pretrained(%r)", loader, loader, flags.to)
    return 0
