"""Restore the newest good checkpoint or initialise, after checking that the config still fits."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from llmjax.binding import bind, differences
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import DataState, TrainData
from llmjax.errors import UserError
from llmjax.optim import schedules
from llmjax.optim.optimizer import make_optimizer
from llmjax.run import config as run_config, state as states
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec
from llmjax.train.context import Progress

# Fields of the model that change how it computes, not what it is.
_FREE_MODEL_FIELDS = {"scan", "remat", "attention", "recurrence", "unroll", "dtype", "dropout"}
# Fields of the optimizer that make its learning rate; a change is honoured, and said.
_RATE_FIELDS = {"learning_rate", "schedule", "warmup_steps", "decay_fraction", "end_fraction"}


def restore_or_init(
    config: RunConfig,
    spec: StateSpec,
    data: TrainData,
    checkpoints: Checkpoints,
    tokenizer_sha256: str,
    say: Callable[[str], None],
) -> Progress:
    """The newest good checkpoint on this mesh, or a fresh state where there is none.

    Raises UserError where the config changed in a way that matters, with the differences, and where every checkpoint
    is damaged.
    """
    known = _newest_meta(checkpoints)
    imported = known is not None and "imported" in known
    keeps_optimizer = known is None or (not imported and _same_state(config, known, spec))
    abstract = states.to_checkpoint(spec.abstract())
    if not keeps_optimizer:
        del abstract["opt_state"]
    restored = checkpoints.restore_latest_good(
        abstract, check=lambda meta: _check_changes(config, meta, tokenizer_sha256), say=say
    )
    if restored is None:
        return Progress(0, 0, states.init_state(spec, config.model, config.seed), data.start())
    meta, parts = restored.meta, restored.parts
    for line in _changes(config, meta, tokenizer_sha256):
        say(f"  accepted change: {line}")
    if not keeps_optimizer:
        if not imported:
            say("  the parameters are kept; the optimizer's state starts fresh, and its learning rate at update 0")
        init = jax.jit(spec.optimizer.init, out_shardings=spec.shardings.opt_state)
        parts = {**parts, "opt_state": init(parts["params"])}
    else:
        _say_rates(config, meta, restored.step - meta["skipped"], say)
    if not imported:
        _say_computation(config, meta, say)
    state = states.from_checkpoint(spec, parts, step=restored.step, skipped=meta["skipped"])
    if imported:
        say(f"  starting from the parameters that were imported from {meta['imported']}")
        return Progress(0, 0, state, data.start())
    say(f"  resuming at step {restored.step}, fingerprint {meta['fingerprint']}")
    return Progress(restored.step, meta["tokens"], state, _data_state(config, data, meta, say))


def _newest_meta(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """What the newest readable checkpoint says of itself; damaged ones are dealt with at the restore."""
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.read_meta(step)
        except UserError:
            continue
    return None


def _same_state(config: RunConfig, meta: dict[str, Any], spec: StateSpec) -> bool:
    """Whether the saved optimizer state is one that this config's optimizer can go on with."""
    old = bind(RunConfig, meta["config"])
    optimizer = make_optimizer(old.optimizer, horizon=old.train.steps, axes=spec.axes)
    shapes = jax.eval_shape(optimizer.init, spec.shapes.params)
    same_leaves = jax.tree.structure(shapes) == jax.tree.structure(spec.shapes.opt_state)
    return old.optimizer.name == config.optimizer.name and same_leaves


def _optimizer_changes(config: RunConfig, meta: dict[str, Any]) -> list[str]:
    return _lines("optimizer", config, meta, _RATE_FIELDS)


def _lines(section: str, config: RunConfig, meta: dict[str, Any], free: set[str]) -> list[str]:
    old = run_config.to_json(bind(RunConfig, meta["config"]))  # a field that was not there yet had its default
    found = differences(old[section], run_config.to_json(config)[section])
    return [f"{section}.{field}: {was!r} -> {now!r}" for field, was, now in found if field not in free]


def _changes(config: RunConfig, meta: dict[str, Any], tokenizer_sha256: str) -> list[str]:
    """Differences that matter and that `checkpoint.accept_changes` can accept."""
    lines = [] if "imported" in meta else _optimizer_changes(config, meta)
    if meta["tokenizer_sha256"] != tokenizer_sha256:
        lines.insert(0, f"tokenizer: sha256 {meta['tokenizer_sha256'][:12]} -> {tokenizer_sha256[:12]}")
    return lines


def _check_changes(config: RunConfig, meta: dict[str, Any], tokenizer_sha256: str) -> None:
    model = _lines("model", config, meta, _FREE_MODEL_FIELDS)
    if model:
        raise UserError(
            f"the checkpoint's model is another one ({'; '.join(model)}): undo the change or take a new --workdir"
        )
    lines = _changes(config, meta, tokenizer_sha256)
    if lines and not config.checkpoint.accept_changes:
        raise UserError(
            f"the config changed since the checkpoint in a way that matters ({'; '.join(lines)}): undo it, take a new "
            "--workdir, or accept it with --config.checkpoint.accept_changes=true"
        )


def _say_rates(config: RunConfig, meta: dict[str, Any], count: int, say: Callable[[str], None]) -> None:
    old = bind(RunConfig, meta["config"])
    if config.train.steps != old.train.steps:
        say("  " + schedules.describe_change(config.optimizer, old.train.steps, config.train.steps, count))
    for line in _lines("optimizer", config, meta, set(dataclasses.asdict(config.optimizer)) - _RATE_FIELDS):
        say(f"  changed since the checkpoint: {line}")


def _say_computation(config: RunConfig, meta: dict[str, Any], say: Callable[[str], None]) -> None:
    """Tell changes of what is trained for, and of what decides the last bits on CPU."""
    old = bind(RunConfig, meta["config"])
    fields = (
        ("train.z_loss", old.train.z_loss, config.train.z_loss),
        ("parallel.cpu_threads", old.parallel.cpu_threads, config.parallel.cpu_threads),
    )
    for field, was, now in fields:
        if was != now:
            say(f"  changed since the checkpoint: {field}: {was!r} -> {now!r}")


def _data_state(config: RunConfig, data: TrainData, meta: dict[str, Any], say: Callable[[str], None]) -> DataState:
    saved = DataState.from_json(meta["data_state"])
    try:
        data.check(saved)
    except UserError as error:
        if not config.checkpoint.accept_changes:
            raise UserError(f"{error}; or accept it with --config.checkpoint.accept_changes=true") from None
        say(f"  accepted change: {error}")
    return dataclasses.replace(data.start(), next_sample=saved.next_sample)
