"""`llmjax import`: a Hugging Face folder or a GGUF file becomes a workdir."""

import logging
import os
import pathlib

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir
from llmjax.errors import UserError

logger = logging.getLogger(__name__)


def import_(arguments: list[str]) -> int:
    """Import a published checkpoint."""
    parser = make_parser(
        "import",
        """\
        Read a checkpoint of Hugging Face transformers from a local folder (config.json, model.safetensors or shards
        with their index, tokenizer.json or a SentencePiece model), or a GGUF file, into checkpoint 0 of a new workdir.
        Quantized tensors are dequantized. Tensors go to the devices part by part, so that the host never holds a full
        copy. Model and tokenizer are stored in the workdir: generate, fill and export work at once, and train starts
        from these parameters. eval needs a token store, which prepare and train write.
        --from may also be the workdir of a run: its parameters (with adapters merged) and its tokenizer start a new
        run.""",
        "llmjax import --from=checkpoints/gpt2 --workdir=runs/gpt2 --config.model.dtype=bfloat16",
        job=True,
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="PATH",
        help="a folder with config.json, FILE.gguf, or a workdir",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="also read an adapter of PEFT, a folder with adapter_config.json"
    )
    parser.add_argument("--step", type=int_range(0), help="the checkpoint of a workdir (default: the newest)")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELD",
        help="accept this unknown field of config.json if it changes no number of the model; may be repeated",
    )
    flags, overrides = parse(parser, arguments)
    from llmjax.data.chat_template import find_template
    from llmjax.parallel import hosts
    from llmjax.run import config as run_config, next_commands, workdir as workdirs

    # The backend starts before the source is read, so its settings come from the overrides alone.
    backend = run_config.apply_overrides({}, [(name, text) for name, text in overrides if name.startswith("parallel.")])
    hosts.initialize(backend.parallel.cpu_threads)
    from llmjax.interop import import_run, importing

    source = pathlib.Path(os.path.expanduser(flags.source))
    workdir = flags.workdir
    adapter = None if flags.adapter is None else pathlib.Path(os.path.expanduser(flags.adapter))
    if not source.is_file() and import_run.is_run(parse_workdir(flags.source)):
        if adapter is not None:
            raise UserError(f"--adapter={adapter}: fits a published checkpoint alone, and {source} is a workdir")
        loaded = import_run.import_run(
            parse_workdir(flags.source), parse_workdir(workdir), step=flags.step, overrides=overrides
        )
        logger.info("the %s of step %d of %s are now %s", loaded.params_name, loaded.step, source, workdir)
        logger.info("next: llmjax train --workdir=%s --config.data.sources.mine.path='texts/*.txt'", workdir)
        return 0
    if flags.step is not None:
        raise UserError(f"--step={flags.step}: {source} is no workdir of llmjax; leave the flag out")
    imported = importing.import_checkpoint(
        source, parse_workdir(workdir), overrides=overrides, ignore=flags.ignore, adapter=adapter
    )
    model = imported.config.model
    logger.info(
        f"{imported.architecture} is now {workdir}: model.family={model.family!r}, {imported.parameters:,} parameters "
        f"stored as {model.param_dtype}, read from {imported.nbytes / 1e9:.2f} GB of {', '.join(imported.types)}, "
        f"{imported.tokenizer}"
    )
    lacks_head = bool(imported.initialized)  # so that what it would predict has no meaning yet
    objective = imported.config.objective.name
    has_template = find_template(parse_workdir(workdir) / workdirs.TOKENIZER) is not None
    if lacks_head:
        next_command = next_commands.embed_texts(workdir)
    elif has_template and model.generates and not model.reads_source:
        next_command = next_commands.chat(workdir)
    else:
        next_command = next_commands.use_model(workdir, objective)
    logger.info("next: %s", next_command)
    logger.info("      %s", next_commands.score_model(workdir, store=None))
    return 0
