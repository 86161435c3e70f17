"""`llmjax import`: a Hugging Face checkpoint becomes a workdir."""

import logging
import os
import pathlib

from llmjax.cli.flags import make_parser, parse, parse_workdir

logger = logging.getLogger(__name__)


def import_(arguments: list[str]) -> int:
    """Import a published checkpoint."""
    parser = make_parser(
        "import",
        """\
        Read a checkpoint of Hugging Face transformers from a local folder (config.json, model.safetensors or shards
        with their index, tokenizer.json or a SentencePiece model) into checkpoint 0 of a new workdir. Tensors go to the
        devices part by part, so that the host never holds a full copy. Model and tokenizer are stored in the workdir:
        generate, eval and export work on it at once, and train starts from these parameters.""",
        "llmjax import --from=checkpoints/gpt2 --workdir=runs/gpt2 --config.model.dtype=bfloat16",
    )
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="a folder with config.json")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELD",
        help="accept this unknown field of config.json if it changes no number of the model; may be repeated",
    )
    flags, overrides = parse(parser, arguments)
    from llmjax.parallel import hosts
    from llmjax.run import config as run_config

    # The backend starts before the source is read, so its settings come from the overrides alone.
    backend = run_config.apply_overrides({}, [(name, text) for name, text in overrides if name.startswith("parallel.")])
    hosts.initialize(backend.parallel.cpu_threads)
    from llmjax.interop import importing

    source = pathlib.Path(os.path.expanduser(flags.source))
    workdir = flags.workdir
    imported = importing.import_checkpoint(source, parse_workdir(workdir), overrides=overrides, ignore=flags.ignore)
    model = imported.config.model
    logger.info(
        f"{imported.architecture} is now {workdir}: model.family={model.family!r}, {imported.parameters:,} parameters "
        f"stored as {model.param_dtype}, read from {imported.nbytes / 1e9:.2f} GB of {', '.join(imported.types)}, "
        f"{imported.tokenizer}"
    )
    if model.generates:
        logger.info("next: llmjax generate --workdir=%s --prompt='Once upon a time'", workdir)
    logger.info("      llmjax train --workdir=%s --config.data.sources.main.path='/my/texts/**/*.txt'", workdir)
    return 0
