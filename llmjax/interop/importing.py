"""`llmjax import`: a published checkpoint becomes step 0 of a workdir."""

from collections.abc import Sequence
import dataclasses
import logging
import math
from pathlib import Path
import tempfile
from typing import Any

from etils import epath

from llmjax import atomic
from llmjax.batch import Params
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.data.store.tokenizer_settings import TokenizerSettings
from llmjax.errors import UserError
from llmjax.interop import gguf_import, heads, hf_checkpoint, peft, sharded_io, tokenizers
from llmjax.interop.mapping import ParamMapping, flatten
from llmjax.models import registry
from llmjax.parallel import axes, hosts
from llmjax.run import config as run_config, loading, state as states, workdir as workdirs
from llmjax.run.config import RunConfig

logger = logging.getLogger(__name__)

_TOKEN_IDS = ("bos_token_id", "pad_token_id")  # fields of config.json that llmjax does not use, and export writes back


@dataclasses.dataclass(frozen=True)
class Imported:
    """A summary of an import.

    architecture class in config.json
    parameters   their number, without the padding of the vocabulary
    nbytes       size of the tensors in the files
    types        types of the tensors in the files
    tokenizer    name of its file
    config       of the new run
    initialized  parameters that the files do not hold, by dotted name
    """

    architecture: str
    parameters: int
    nbytes: int
    types: list[str]
    tokenizer: str
    config: RunConfig
    initialized: list[str]


def import_checkpoint(
    source: Path,
    workdir: epath.Path,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    adapter: Path | None = None,
) -> Imported:
    """Read the folder or GGUF file `source` into checkpoint 0 of `workdir`.

    There is no optimizer state, so that any optimizer can continue.

    ignore   unknown fields of config.json that are accepted
    adapter  a folder of PEFT's, whose adapter is put on the model
    Raises UserError if the folder is not supported, or if the workdir contains a run. A collective: all processes call
    it, and each reads what its devices hold.
    """
    if (workdir / workdirs.CONFIG).exists():
        raise UserError(f"--workdir={workdir}: already contains a run; give a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        is_gguf = source.is_file()
        checkpoint = gguf_import.read(source, Path(scratch), ignore) if is_gguf else hf_checkpoint.read(source)
        return _import(checkpoint, workdir, overrides, ignore, adapter)


def _import(
    checkpoint: hf_checkpoint.Checkpoint,
    workdir: epath.Path,
    overrides: Sequence[tuple[str, str]],
    ignore: Sequence[str],
    adapter: Path | None,
) -> Imported:
    tensors = checkpoint.tensors
    section = checkpoint.read_model(ignore)
    folder = epath.Path(checkpoint.tokenizer_folder or checkpoint.folder)
    try:
        tokenizer_file = tokenizers.find_tokenizer(folder, checkpoint.hf, num_rows=section["vocab_size"])
    except UserError as error:  # the folder of a GGUF file's tokenizer is a temporary one
        raise UserError(str(error).replace(str(folder), str(checkpoint.folder))) from None
    labels = heads.read_labels(checkpoint.hf) if section.get("num_outputs") else None
    config = _run_config(section, tokenizer_file.tokenizer, workdir, overrides, labels)
    if config.model.lora.rank:
        raise UserError(f"model.lora.rank={config.model.lora.rank}: set it when you train, or read --adapter=DIR")
    architecture = checkpoint.architecture
    table = ParamMapping(architecture.rules(config.model), config.model, architecture.missing)
    table.check_tensors(tensors)
    _check_aliases(table, tensors)
    types, gigabytes = ", ".join(tensors.types), tensors.nbytes / 1e9
    logger.info("%s: %d tensors of %s, %.2f GB", checkpoint.name, len(tensors.shapes()), types, gigabytes)
    initialized = table.find_missing(tensors)
    notes = _describe_heads(checkpoint, table, initialized, config.seed)
    for note in notes + _make_notes(tokenizer_file.settings, tokenizer_file.tokenizer, config):
        logger.info("  note: %s", note)

    _, shapes, names = registry.abstract(config.model)
    with axes.use_mesh(loading.mesh_or_default(config), config.parallel.rules):
        shardings = flatten(axes.shardings(names, shapes))
        initial = states.draw_parameters(config.model, initialized, config.seed)
        params = sharded_io.read(table, tensors, shardings, initial)
        if adapter is not None:
            adapted, params = peft.read(adapter, config.model, params, table)
            config = dataclasses.replace(config, model=adapted)
    _write_workdir(workdir, config, params, checkpoint, tokenizer_file, ignore, initialized)
    return Imported(
        architecture=checkpoint.name,
        parameters=table.count(),
        nbytes=tensors.nbytes,
        types=tensors.types,
        tokenizer=tokenizer_file.name,
        config=config,
        initialized=initialized,
    )


def _write_workdir(
    workdir: epath.Path,
    config: RunConfig,
    params: Params,
    checkpoint: hf_checkpoint.Checkpoint,
    tokenizer_file: tokenizers.TokenizerFile,
    ignore: Sequence[str],
    initialized: list[str],
) -> None:
    tokenizer, source = tokenizer_file.tokenizer, checkpoint.folder
    workdir.mkdir(parents=True, exist_ok=True)
    with workdirs.Lock(workdir, primary=hosts.is_primary()):
        if hosts.is_primary():
            with atomic.name_in_errors(workdir / workdirs.TOKENIZER):
                folder = epath.Path(checkpoint.tokenizer_folder or source)
                tokenizers.copy_to_workdir(folder, tokenizer_file, workdir)
        logger.info("writing checkpoint 0")
        fingerprint = loading.save_imported(workdir, config, params, str(source.resolve()), tokenizer)
        if hosts.is_primary():
            record = {
                "from": str(source.resolve()),
                "architecture": checkpoint.name,
                "types": checkpoint.tensors.types,
                "ignored": list(ignore),
                "initialized": initialized,
                "left_out": checkpoint.left_out,
                "fingerprint": fingerprint,
                "model": run_config.to_json(config)["model"],
                "tokenizer": {"kind": tokenizer.kind, "name": tokenizer_file.name, "sha256": tokenizer.sha256},
                "token_ids": {field: checkpoint.hf[field] for field in _TOKEN_IDS if field in checkpoint.hf},
            }
            workdirs.write_json(workdir / workdirs.IMPORT, record)
            workdirs.write_json(workdir / workdirs.CONFIG, run_config.to_json(config))  # last: this makes it a run
        hosts.barrier("imported")


def _describe_heads(
    checkpoint: hf_checkpoint.Checkpoint, table: ParamMapping, initialized: list[str], seed: int
) -> list[str]:
    """Which parameters the checkpoint lacks, and which of its tensors llmjax does not have."""
    notes = []
    if initialized:
        count = sum(math.prod(table.unpadded_shape(name)) for name in initialized)
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in initialized))
        notes.append(
            f"initialized with seed={seed}, since {checkpoint.name} has none: {parts} ({count:,} parameters); train "
            "before you use what it computes"
        )
    if checkpoint.left_out:
        notes.append(f"left out, since llmjax has no such head: {', '.join(sorted(checkpoint.left_out))}")
    return notes


def _run_config(
    section: dict[str, Any],
    tokenizer: Tokenizer,
    workdir: epath.Path,
    overrides: Sequence[tuple[str, str]],
    labels: heads.Labels | None,
) -> RunConfig:
    """The config of the new run; `labels` of the head, None for one that predicts tokens."""
    family = registry.config_class(section["family"])
    # No file says whether an encoder-decoder is tuned on instructions. Most that generate text are, and their prompts
    # are text and EOS, which is what the tokenizers of the others make of a prompt, too.
    prompt_form = {"prompt_form": "plain"} if family.reads_source else {}
    tree: dict[str, Any] = {
        "model": section,
        "objective": {"name": family.objectives[0], **prompt_form},
        "data": {"tokenizer": loading.tokenizer_section(workdir, tokenizer.kind)},
    }
    if labels is not None:
        tree["objective"] = {"name": "classify" if labels.classes else "regress"}
        tree["data"] |= labels._asdict()
        if section["positions"] == "learned":  # how long a text may be, as in transformers
            tree["data"]["seq_len"] = section["max_positions"]
    return run_config.apply_overrides(tree, overrides)


def _check_aliases(table: ParamMapping, tensors: hf_checkpoint.StoredTensors) -> None:
    """Compare on process 0, which reads whole tensors for it; all processes raise its error."""
    problem = ""
    if hosts.is_primary():
        try:
            table.check_aliases(tensors)
        except UserError as error:
            problem = str(error)
    if problem := hosts.broadcast("tied tensors", problem, timeout_seconds=3600):
        raise UserError(problem)


def _make_notes(settings: TokenizerSettings, tokenizer: Tokenizer, config: RunConfig) -> list[str]:
    """What the user should know about prompts and generation."""
    notes = []
    if config.model.num_outputs:
        kind = "several classes of" if config.data.multi_label else "a class of"
        what = f"{kind} {', '.join(config.data.classes)}" if config.data.classes else "a number"
        notes.append(f"the model predicts {what}; texts are cut to data.seq_len={config.data.seq_len} tokens")
    if config.model.generates:
        stop_tokens = ", ".join(_describe_token(i, tokenizer) for i in settings.stop_ids)
        prefix = " ".join(_describe_token(i, tokenizer) for i in settings.prefix) or "nothing"
        notes.append(f"generation stops at {stop_tokens}; the tokenizer puts {prefix} before a prompt")
    if config.objective.prompt_form == "plain":
        notes.append(
            "objective.prompt_form='plain': prompts are text and EOS, as instruction-tuned models read them; for one "
            "that only fills gaps, `llmjax generate --prompt_form=trained`"
        )
    min_vocab_size = run_config.objective(config, tokenizer).min_vocab_size
    if min_vocab_size > config.model.vocab_size:
        notes.append(
            f"objective.name={config.objective.name!r} needs {min_vocab_size} ids and the model has "
            f"{config.model.vocab_size}: the tokenizer lacks the special tokens of this objective"
        )
    return notes


def _describe_token(token_id: int, tokenizer: Tokenizer) -> str:
    piece = tokenizer.piece(token_id).decode(errors="replace") if token_id < tokenizer.vocab_size else ""
    return f"{piece or 'id'} ({token_id})"
