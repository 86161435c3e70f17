"""`llmjax export`: a checkpoint becomes a Hugging Face folder or a GGUF file."""

import logging
import os
import pathlib

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir
from llmjax.errors import UserError

logger = logging.getLogger(__name__)

_DTYPES = {"huggingface": ("float32", "bfloat16"), "gguf": ("f32", "f16", "q8_0")}


def export(arguments: list[str]) -> int:
    """Write a checkpoint for transformers or llama.cpp."""
    parser = make_parser(
        "export",
        """\
        Write a checkpoint as a folder that transformers loads with from_pretrained: config.json, model.safetensors or
        shards with their index, and the tokenizer. The class of transformers is chosen to fit the model; where none
        fits, the error names the field. With --format=gguf, write one GGUF file, which llama.cpp and Ollama run. The
        exported parameters are those that `llmjax eval` scores: an average where the optimizer keeps one. Adapters are
        merged into the weights; --adapter writes them alone, for PEFT. A folder gets a model card (README.md): that of
        WORKDIR where you wrote or changed it, else one of `llmjax card`.""",
        "llmjax export --workdir=runs/mine --to=exports/mine --dtype=bfloat16",
        job=True,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder, or a new file FILE.gguf")
    parser.add_argument("--format", default="huggingface", choices=_DTYPES, help="what to write (default huggingface)")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument(
        "--dtype",
        help="on disk: float32 (default) or bfloat16; with --format=gguf f32 (default), f16 or q8_0, for matrices",
    )
    parser.add_argument(
        "--max_shard_bytes",
        type=int_range(1),
        default=5_000_000_000,
        help="largest size of a file (default 5,000,000,000)",
    )
    parser.add_argument("--adapter", action="store_true", help="write the adapters alone, in PEFT's format, in float32")
    flags, overrides = parse(parser, arguments)
    known = _DTYPES[flags.format]
    dtype = flags.dtype or known[0]
    if dtype not in known:
        raise UserError(f"--dtype={dtype}: with --format={flags.format}, choose one of {', '.join(known)}")
    if flags.format == "gguf" and not flags.to.endswith(".gguf"):
        raise UserError(f"--to={flags.to}: with --format=gguf, give a file whose name ends in .gguf")
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.interop import exporting

    if flags.adapter:
        workdir, to = parse_workdir(flags.workdir), pathlib.Path(os.path.expanduser(flags.to))
        name, step, count = exporting.export_adapter(workdir, to, step=flags.step, overrides=overrides)
        logger.info("written to %s: adapters of step %d for %d linear layers of %s", to, step, count, name)
        logger.info("next, in Python: from peft import PeftModel; PeftModel.from_pretrained(model, %r)", str(to))
        return 0
    exported = exporting.export(
        parse_workdir(flags.workdir),
        pathlib.Path(os.path.expanduser(flags.to)),
        step=flags.step,
        dtype=dtype,
        max_shard_bytes=flags.max_shard_bytes,
        overrides=overrides,
    )
    name, gigabytes = exported.architecture, exported.nbytes / 1e9
    logger.info("written to %s: %s in %d file(s), %.2f GB", flags.to, name, len(exported.files), gigabytes)
    logger.info("tokenizer: %s", exported.tokenizer)
    if exported.card:
        logger.info("model card: %s", exported.card)
    if flags.format == "gguf":
        logger.info("next: llama-cli --model %s --prompt 'Once upon a time'", flags.to)
        return 0
    loader = "AutoModelForCausalLM" if name.endswith(("CausalLM", "LMHeadModel")) else name
    logger.info("next, in Python: from transformers import %s; %s.from_pretrained(%r)", loader, loader, flags.to)
    return 0
