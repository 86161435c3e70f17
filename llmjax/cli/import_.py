"""`llmjax import`: a Hugging Face checkpoint becomes a workdir."""

import os
import pathlib

from llmjax.cli.flags import make_parser, parse, parse_workdir, say
from llmjax.cli.logs import configure_logging


def import_(arguments: list[str]) -> int:
    """Take over a published checkpoint."""
    parser = make_parser(
        "import",
        """\
        Read a checkpoint of Hugging Face transformers from a local folder (config.json, model.safetensors or shards
        with their index, tokenizer.json or a SentencePiece model) into checkpoint 0 of a new workdir. Tensors go to the
        devices part by part, so that the host holds no copy of the whole. Model and tokenizer are kept with the
        workdir: generate, eval and export work on it at once, and train goes on from these parameters.""",
        "llmjax import --from=checkpoints/gpt2 --workdir=runs/gpt2 --config.model.dtype=bfloat16",
    )
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="a folder with config.json")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELD",
        help="accept this unknown field of config.json, which changes no number of the model; may be repeated",
    )
    flags, overrides = parse(parser, arguments)
    configure_logging()
    from llmjax.parallel import hosts
    from llmjax.run import config as run_config

    # The model is known once the source is read; what the backend needs of the config is in the overrides alone.
    parallel = run_config.apply_overrides(
        {}, [(name, text) for name, text in overrides if name.startswith("parallel.")]
    )
    hosts.initialize(parallel.parallel.cpu_threads)
    from llmjax.interop import importing

    source = pathlib.Path(os.path.expanduser(flags.source))
    found = importing.import_checkpoint(source, parse_workdir(flags.workdir), overrides=overrides, ignore=flags.ignore)
    model, workdir = found.config.model, flags.workdir
    say(
        f"{found.architecture} is now {workdir}: model.family={model.family!r}, {found.parameters:,} parameters stored "
        f"as {model.param_dtype}, read from {found.nbytes / 1e9:.2f} GB of {', '.join(found.types)}, {found.tokenizer}"
    )
    if model.generates:
        say(f"next: llmjax generate --workdir={workdir} --prompt='Once upon a time'")
    say(f"      llmjax train --workdir={workdir} --config.data.sources.main.path='/my/texts/**/*.txt'")
    return 0
