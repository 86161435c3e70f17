"""`llmjax import`: a published checkpoint becomes step 0 of a workdir."""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from etils import epath
import jax

import llmjax
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.data.store.tokenizer_settings import TokenizerSettings
from llmjax.errors import UserError
from llmjax.interop import hf_checkpoint, sharded_io, tokenizers
from llmjax.interop.mapping import ParamMapping
from llmjax.models import registry
from llmjax.parallel import axes, hosts
from llmjax.run import config as run_config, loading, workdir as workdirs
from llmjax.run.config import RunConfig

TOKEN_IDS = ("bos_token_id", "pad_token_id")  # of config.json, which only other readers use


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was read: class name, parameters (without the padding of the vocabulary), files, and the config made."""

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
    say: Callable[[str], None] = print,
) -> Imported:
    """Read the folder `source` into a checkpoint of step 0 in `workdir`: parameters alone, so that any optimizer can go
    on with them. `ignore` names unknown fields of config.json that are accepted.

    Raises UserError where the folder is not what we know, and where the workdir holds a run. A collective: all
    processes call it, and each reads what its devices hold.
    """
    if (workdir / workdirs.CONFIG).exists():
        raise UserError(f"--workdir={workdir}: holds a run already; give a new folder")
    found = hf_checkpoint.read(source)
    section = found.read_model(ignore)
    name, content, settings, tokenizer = tokenizers.find(epath.Path(source), found.hf, num_rows=section["vocab_size"])
    config = _config(section, tokenizer, workdir, overrides)
    table = ParamMapping(found.architecture.rules(config.model), config.model)
    table.check(found.tensors)
    _check_copies(table, found)
    say(f"{found.name}: {len(found.tensors.shapes())} tensors of {', '.join(found.tensors.types)}, {_size(found)}")
    for note in _notes(settings, tokenizer, config):
        say(f"  note: {note}")

    _, shapes, names = registry.abstract(config.model)
    with axes.use_mesh(loading.mesh_or_default(config), config.parallel.rules):
        shardings = table.flat(axes.shardings(names, shapes))
    params = sharded_io.read(table, found.tensors, shardings, say)
    workdir.mkdir(parents=True, exist_ok=True)
    with workdirs.Lock(workdir, primary=hosts.is_primary()):
        if hosts.is_primary():
            tokenizers.keep(epath.Path(source), content, settings, tokenizer, workdir)
        say("writing checkpoint 0")
        fingerprint = _save(workdir, config, params, tokenizer, source)
        if hosts.is_primary():
            record = {
                "from": str(source.resolve()),
                "architecture": found.name,
                "types": found.tensors.types,
                "ignored": list(ignore),
                "fingerprint": fingerprint,
                "model": run_config.to_json(config)["model"],
                "tokenizer": {"kind": tokenizer.kind, "name": name, "sha256": tokenizer.sha256},
                "token_ids": {field: found.hf[field] for field in TOKEN_IDS if field in found.hf},
            }
            workdirs.write_json(workdir / workdirs.IMPORT, record)
            workdirs.write_json(workdir / workdirs.CONFIG, run_config.to_json(config))  # last: now it is a run
        hosts.barrier("imported")
    return Imported(
        architecture=found.name,
        parameters=table.count(),
        nbytes=found.tensors.nbytes,
        types=found.tensors.types,
        tokenizer=name,
        config=config,
    )


def _config(
    section: dict[str, Any], tokenizer: Tokenizer, workdir: epath.Path, overrides: Sequence[tuple[str, str]]
) -> RunConfig:
    tree: dict[str, Any] = {
        "model": section,
        "objective": _objective(registry.config_class(section["family"])),
        "data": {"tokenizer": loading.tokenizer_section(workdir, tokenizer.kind)},
    }
    return run_config.apply_overrides(tree, overrides)


def _objective(family: Any) -> dict[str, Any]:
    """The config's section. A file does not tell whether an encoder-decoder was tuned on instructions; most that are
    asked for text were, and text and EOS is what the tokenizer beside it makes of a prompt for others, too."""
    return {"name": family.objectives[0]} | ({"prompt_form": "plain"} if family.reads_source else {})


def _check_copies(table: ParamMapping, found: hf_checkpoint.Checkpoint) -> None:
    """Process 0 compares, as this reads tensors as a whole; all of them hear what it found."""
    problem = ""
    if hosts.is_primary():
        try:
            table.check_copies(found.tensors)
        except UserError as error:
            problem = str(error)
    if problem := hosts.broadcast("tied tensors", problem, timeout_seconds=3600):
        raise UserError(problem)


def _save(workdir: epath.Path, config: RunConfig, params: dict, tokenizer: Tokenizer, source: Path) -> str:
    kept = config.checkpoint
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, keep=kept.keep, timeout_seconds=kept.timeout_seconds)
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


def _notes(settings: TokenizerSettings, tokenizer: Tokenizer, config: RunConfig) -> list[str]:
    notes = []
    if config.model.generates:
        ends = ", ".join(_shown(i, tokenizer) for i in settings.stop_ids)
        begin = " ".join(_shown(i, tokenizer) for i in settings.prefix) or "nothing"
        notes.append(f"generation stops at {ends}; the tokenizer puts {begin} before a prompt")
    if config.objective.prompt_form == "plain":
        notes.append(
            "objective.prompt_form='plain': prompts are text and EOS, as instruction-tuned models read them; for one "
            "that only fills gaps, `llmjax generate --prompt_form=trained`"
        )
    if (needed := run_config.objective(config, tokenizer).min_vocab_size) > config.model.vocab_size:
        notes.append(
            f"objective.name={config.objective.name!r} needs {needed} ids and the model has {config.model.vocab_size}: "
            "the tokenizer lacks its marks"
        )
    return notes


def _shown(number: int, tokenizer: Tokenizer) -> str:
    name = tokenizer.piece(number).decode(errors="replace") if number < tokenizer.vocab_size else ""
    return f"{name or 'id'} ({number})"


def _size(found: hf_checkpoint.Checkpoint) -> str:
    return f"{found.tensors.nbytes / 1e9:.2f} GB"
