"""`llmjax export`: a checkpoint becomes a Hugging Face folder."""

import os
import pathlib

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir, say
from llmjax.cli.logs import configure_logging


def export(arguments: list[str]) -> int:
    """Give a checkpoint to others."""
    parser = make_parser(
        "export",
        """\
        Write a checkpoint as a folder that transformers loads with from_pretrained: config.json, model.safetensors or
        shards with their index, the tokenizer. The class is the one that expresses the model; where none does, the
        field is named. What is exported is what `llmjax eval` scores: an average where the optimizer keeps one.""",
        "llmjax export --workdir=runs/mine --to=exports/mine --dtype=bfloat16",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="on disk (default float32)")
    parser.add_argument(
        "--max_shard_bytes", type=int_range(1), default=5_000_000_000, help="of a file (default 5,000,000,000)"
    )
    flags, overrides = parse(parser, arguments)
    configure_logging()
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.interop import exporting

    made = exporting.export(
        parse_workdir(flags.workdir),
        pathlib.Path(os.path.expanduser(flags.to)),
        step=flags.step,
        dtype=flags.dtype,
        max_shard_bytes=flags.max_shard_bytes,
        overrides=overrides,
    )
    say(f"written to {flags.to}: {made.architecture} in {len(made.files)} file(s), {made.nbytes / 1e9:.2f} GB")
    say(f"tokenizer: {made.tokenizer}")
    auto = "AutoModelForCausalLM" if made.architecture.endswith(("CausalLM", "LMHeadModel")) else made.architecture
    say(f"next: from transformers import {auto}; {auto}.from_pretrained({flags.to!r})")
    return 0
