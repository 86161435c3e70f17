"""`llmjax import --from=WORKDIR`: the parameters of a run become step 0 of a new workdir, to train them further."""

import dataclasses
import logging
from typing import Any

from etils import epath
import jax

from llmjax.data.chat_template import copy_template
from llmjax.data.store.tokenizer import FILE_NAMES
from llmjax.data.store.tokenizer_settings import FILE as SETTINGS_FILE
from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.run import config as run_config, loading, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)


def is_run(folder: epath.Path) -> bool:
    """Whether a folder is the workdir of a run, and not a published checkpoint."""
    return (folder / workdirs.CHECKPOINTS).is_dir()


def import_run(
    source: epath.Path,
    workdir: epath.Path,
    *,
    step: int | None = None,
    overrides: list[tuple[str, str]] | tuple[tuple[str, str], ...] = (),
) -> Loaded:
    """Copy the parameters that `llmjax eval` scores, with adapters merged, into checkpoint 0 of `workdir`.

    Model, objective and tokenizer are kept; no state of the optimizer is. Returns what was read.
    Raises UserError if the workdir contains a run. A collective: all processes call it.
    """
    if (workdir / workdirs.CONFIG).exists():
        raise UserError(f"--workdir={workdir}: already contains a run; give a new folder")
    with loading.load(source, step=step) as loaded:
        loaded = loading.merge_adapters(loaded)
        shapes = states.abstract_params(loaded.config.model)
        params = jax.tree.map(lambda param, shape: param.astype(shape.dtype), loaded.params, shapes)
        workdir.mkdir(parents=True, exist_ok=True)
        with workdirs.Lock(workdir, primary=hosts.is_primary()):
            record = _copy_tokenizer(source, workdir, loaded) if hosts.is_primary() else {}
            hosts.barrier("tokenizer copied")
            config = _new_config(loaded, workdir, overrides)
            origin = f"{source} at step {loaded.step}"
            fingerprint = loading.save_imported(workdir, config, params, origin, loaded.tokenizer)
            if hosts.is_primary():
                model = run_config.to_json(config)["model"]
                record |= {"from": origin, "fingerprint": fingerprint, "model": model}
                workdirs.write_json(workdir / workdirs.IMPORT, record)
                workdirs.write_json(workdir / workdirs.CONFIG, run_config.to_json(config))  # last: this makes it a run
            hosts.barrier("imported")
    return loaded


def _new_config(loaded: Loaded, workdir: epath.Path, overrides: Any) -> RunConfig:
    old = run_config.to_json(loaded.config)
    tokenizer = loading.tokenizer_section(workdir, loaded.tokenizer.kind)
    data = {"seq_len": old["data"]["seq_len"], "tokenizer": tokenizer}
    tree = {"model": old["model"], "objective": old["objective"], "data": data}
    config = run_config.apply_overrides(tree, overrides)
    for field in dataclasses.fields(config.model):
        before, after = getattr(loaded.config.model, field.name), getattr(config.model, field.name)
        if field.name in ("lora", "param_dtype") and before != after:
            raise UserError(
                f"model.{field.name}={after!r}: set it when you train; an import keeps the parameters as they are"
            )
    return config


def _copy_tokenizer(source: epath.Path, workdir: epath.Path, loaded: Loaded) -> dict[str, Any]:
    """Copy the run's tokenizer; returns the fields of import.json that describe it, and the published model it was."""
    old = workdirs.read_json(source / workdirs.IMPORT) or {}
    tokenizer, to = loaded.tokenizer, workdir / workdirs.TOKENIZER
    to.mkdir(parents=True, exist_ok=True)
    is_imported = old.get("tokenizer", {}).get("sha256") == tokenizer.sha256
    if is_imported:
        _copy_folder(source / workdirs.TOKENIZER, to)
    copy_template(loaded.store, to)
    if is_imported:
        return {name: old[name] for name in ("architecture", "types", "tokenizer", "token_ids") if name in old}
    for name in (FILE_NAMES[tokenizer.kind], SETTINGS_FILE):
        if (file := loaded.store / name).exists():
            (to / name).write_bytes(file.read_bytes())
    # Without the name of a published file: an export converts this tokenizer.
    return {"tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256}}


def _copy_folder(folder: epath.Path, to: epath.Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            _copy_folder(path, to / path.name)
        else:
            (to / path.name).write_bytes(path.read_bytes())
