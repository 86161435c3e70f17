"""`llmjax import`: a published checkpoint becomes step 0 of a workdir."""

from collections.abc import Sequence
import dataclasses
import logging
from pathlib import Path
from typing import Any

from etils import epath
import jax

import llmjax
from llmjax import atomic
from llmjax.batch import Params
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.data.store.tokenizer_settings import TokenizerSettings
from llmjax.errors import UserError
from llmjax.interop import hf_checkpoint, sharded_io, tokenizers
from llmjax.interop.mapping import ParamMapping, flatten
from llmjax.models import registry
from llmjax.parallel import axes, hosts
from llmjax.run import config as run_config, loading, workdir as workdirs
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
    """

    architecture: str
    parameters: int
    nbytes: int
    types: list[str]
    tokenizer: str
    config: RunConfig


def import_checkpoint(
    source: Path,
    workdir: epath.Path,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
) -> Imported:
    """Read the folder `source` into checkpoint 0 of `workdir`, without optimizer state, so that any optimizer can
    continue.

    ignore   unknown fields of config.json that are accepted
    Raises UserError if the folder is not supported, or if the workdir contains a run. A collective: all processes call
    it, and each reads what its devices hold.
    """
    if (workdir / workdirs.CONFIG).exists():
        raise UserError(f"--workdir={workdir}: already contains a run; give a new folder")
    checkpoint = hf_checkpoint.read(source)
    tensors = checkpoint.tensors
    section = checkpoint.read_model(ignore)
    tokenizer_file = tokenizers.find_tokenizer(epath.Path(source), checkpoint.hf, num_rows=section["vocab_size"])
    config = _run_config(section, tokenizer_file.tokenizer, workdir, overrides)
    table = ParamMapping(checkpoint.architecture.rules(config.model), config.model)
    table.check_tensors(tensors)
    _check_aliases(table, tensors)
    types, gigabytes = ", ".join(tensors.types), tensors.nbytes / 1e9
    logger.info("%s: %d tensors of %s, %.2f GB", checkpoint.name, len(tensors.shapes()), types, gigabytes)
    for note in _make_notes(tokenizer_file.settings, tokenizer_file.tokenizer, config):
        logger.info("  note: %s", note)

    _, shapes, names = registry.abstract(config.model)
    with axes.use_mesh(loading.mesh_or_default(config), config.parallel.rules):
        shardings = flatten(axes.shardings(names, shapes))
    params = sharded_io.read(table, tensors, shardings)
    _write_workdir(workdir, config, params, checkpoint, tokenizer_file, ignore)
    return Imported(
        architecture=checkpoint.name,
        parameters=table.count(),
        nbytes=tensors.nbytes,
        types=tensors.types,
        tokenizer=tokenizer_file.name,
        config=config,
    )


def _write_workdir(
    workdir: epath.Path,
    config: RunConfig,
    params: Params,
    checkpoint: hf_checkpoint.Checkpoint,
    tokenizer_file: tokenizers.TokenizerFile,
    ignore: Sequence[str],
) -> None:
    tokenizer, source = tokenizer_file.tokenizer, checkpoint.folder
    workdir.mkdir(parents=True, exist_ok=True)
    with workdirs.Lock(workdir, primary=hosts.is_primary()):
        if hosts.is_primary():
            with atomic.name_in_errors(workdir / workdirs.TOKENIZER):
                tokenizers.copy_to_workdir(epath.Path(source), tokenizer_file, workdir)
        logger.info("writing checkpoint 0")
        fingerprint = _save(workdir, config, params, tokenizer, source)
        if hosts.is_primary():
            record = {
                "from": str(source.resolve()),
                "architecture": checkpoint.name,
                "types": checkpoint.tensors.types,
                "ignored": list(ignore),
                "fingerprint": fingerprint,
                "model": run_config.to_json(config)["model"],
                "tokenizer": {"kind": tokenizer.kind, "name": tokenizer_file.name, "sha256": tokenizer.sha256},
                "token_ids": {field: checkpoint.hf[field] for field in _TOKEN_IDS if field in checkpoint.hf},
            }
            workdirs.write_json(workdir / workdirs.IMPORT, record)
            workdirs.write_json(workdir / workdirs.CONFIG, run_config.to_json(config))  # last: this makes it a run
        hosts.barrier("imported")


def _run_config(
    section: dict[str, Any], tokenizer: Tokenizer, workdir: epath.Path, overrides: Sequence[tuple[str, str]]
) -> RunConfig:
    family = registry.config_class(section["family"])
    # No file says whether an encoder-decoder is tuned on instructions. Most that generate text are, and their prompts
    # are text and EOS, which is what the tokenizers of the others make of a prompt, too.
    prompt_form = {"prompt_form": "plain"} if family.reads_source else {}
    tree: dict[str, Any] = {
        "model": section,
        "objective": {"name": family.objectives[0], **prompt_form},
        "data": {"tokenizer": loading.tokenizer_section(workdir, tokenizer.kind)},
    }
    return run_config.apply_overrides(tree, overrides)


def _check_aliases(table: ParamMapping, tensors: hf_checkpoint.Tensors) -> None:
    """Compare on process 0, which reads whole tensors for it; all processes raise its error."""
    problem = ""
    if hosts.is_primary():
        try:
            table.check_aliases(tensors)
        except UserError as error:
            problem = str(error)
    if problem := hosts.broadcast("tied tensors", problem, timeout_seconds=3600):
        raise UserError(problem)


def _save(workdir: epath.Path, config: RunConfig, params: Params, tokenizer: Tokenizer, source: Path) -> str:
    """Write checkpoint 0 and return its fingerprint."""
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, config.checkpoint)
    meta = {
        "config": run_config.to_json(config),
        "imported": str(source.resolve()),
        "tokenizer_sha256": tokenizer.sha256,
        "total_targets": 0,
        "skipped": 0,
        "versions": {"llmjax": llmjax.__version__, "jax": jax.__version__},
    }
    fingerprint = checkpoints.save(0, {"params": params}, meta)
    checkpoints.close()
    return fingerprint


def _make_notes(settings: TokenizerSettings, tokenizer: Tokenizer, config: RunConfig) -> list[str]:
    """What the user should know about prompts and generation."""
    notes = []
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
