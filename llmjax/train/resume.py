"""Restore the newest good checkpoint or initialise, after checking that the config still fits."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

import jax

from llmjax.binding import bind, differences
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.batches.pipeline import DataState, TrainData
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.optim import schedules
from llmjax.optim.trainable import split
from llmjax.run import config as run_config, phases as run_phases, state as states
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec
from llmjax.train.context import Progress

logger = logging.getLogger(__name__)

# Fields of the optimizer that decide its learning rate; a change is applied and logged.
_RATE_FIELDS = {"learning_rate", "schedule", "warmup_steps", "decay_fraction", "end_fraction"}


def restore_or_init(
    config: RunConfig,
    spec: StateSpec,
    data: Mapping[int, TrainData],
    checkpoints: Checkpoints,
    tokenizer_sha256: str,
) -> Progress:
    """The newest good checkpoint on this mesh, or a fresh state where there is none.

    data   that of each stream of rows, see `llmjax.run.phases`

    Raises UserError where the config changed in a way that matters, with the differences, and where every checkpoint
    is damaged.
    """
    newest = _newest_meta(checkpoints)
    imported = newest is not None and "imported" in newest
    keeps_optimizer = newest is None or (not imported and _can_keep_optimizer_state(config, newest, spec))
    abstract = states.to_checkpoint(spec.abstract())
    if not keeps_optimizer:
        del abstract["opt_state"]
    adds_adapters = newest is not None and _adds_adapters(config, newest)
    if newest is not None and imported:  # it may have another head, and no adapters
        abstract["params"] = states.abstract_params(_saved_config(newest).model)
    restored = checkpoints.restore_latest_good(
        abstract, check=lambda meta: _check_changes(config, meta, tokenizer_sha256)
    )
    if restored is None:
        return Progress(0, 0, states.init_state(spec, config.model, config.seed), data[0].start())
    meta, parts = restored.meta, restored.parts
    for line in _changes(config, meta, tokenizer_sha256):
        logger.info("  accepted change: %s", line)
    if imported:
        base = registry.without_adapters(config.model) if adds_adapters else config.model
        params = states.take_parameters(parts["params"], base, config.seed)
        if adds_adapters:
            params = states.add_adapters(spec, config.model, params, config.seed)
        parts = {**parts, "params": params}
    if keeps_optimizer:
        _log_rate_changes(config, meta, restored.step, updates=restored.step - meta["skipped"])
    else:
        if not imported:
            logger.info("  the parameters are kept; the optimizer's state and learning rate start at update 0")
        init = jax.jit(spec.init_optimizer, out_shardings=spec.shardings.opt_state)
        parts = {**parts, "opt_state": init(parts["params"])}
    state = states.from_checkpoint(spec, parts, step=restored.step, skipped=meta["skipped"])
    if imported:
        logger.info("  starting from the parameters that were imported from %s", meta["imported"])
        return Progress(0, 0, state, data[0].start())
    _log_computation_changes(config, meta)
    logger.info("  resuming at step %d, fingerprint %s", restored.step, meta["fingerprint"])
    return Progress(
        restored.step,
        meta["total_targets"],
        state,
        _restore_data_state(config, data, meta, restored.step),
        evaluations={int(step): scores for step, scores in meta.get("evaluations", {}).items()},
        best_loss=meta.get("best_loss"),
    )


def _newest_meta(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The meta of the newest readable checkpoint; the restore reports the damaged ones."""
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.read_meta(step)
        except UserError:
            continue
    return None


def _saved_config(meta: dict[str, Any]) -> RunConfig:
    """The config that a checkpoint was saved with. Raises UserError where another version of llmjax wrote it."""
    try:
        return bind(RunConfig, meta["config"])
    except UserError as error:
        raise UserError(
            f"the checkpoint's config: {error}; another version of llmjax saved it: use that version, or give a new "
            "--workdir"
        ) from error


def _can_keep_optimizer_state(config: RunConfig, meta: dict[str, Any], spec: StateSpec) -> bool:
    """Whether this config's optimizer can continue from the saved state of the optimizer."""
    old = _saved_config(meta)
    try:
        trainable, optimizer = states.make_trained_optimizer(
            config.model, old.optimizer, spec.shapes.params, spec.axes, horizon=old.train.steps
        )
    except UserError:  # it names parameters of another model, which is refused later
        return False
    shapes = jax.eval_shape(optimizer.init, split(spec.shapes.params, trainable)[0])
    leaves = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    new = spec.shapes.opt_state
    same_leaves = jax.tree.structure(shapes) == jax.tree.structure(new) and leaves(shapes) == leaves(new)
    return old.optimizer.name == config.optimizer.name and same_leaves


def _adds_adapters(config: RunConfig, meta: dict[str, Any]) -> bool:
    """Whether the checkpoint holds imported parameters without adapters, and the config asks for some."""
    return "imported" in meta and bool(config.model.lora.rank) and not _saved_config(meta).model.lora.rank


def _section_changes(section: str, config: RunConfig, meta: dict[str, Any], ignore: set[str]) -> list[str]:
    """Lines `section.field: old -> new`; a field that is missing in the checkpoint's config had its default."""
    old = run_config.to_json(_saved_config(meta))
    changes = differences(old[section], run_config.to_json(config)[section])
    return [f"{section}.{field}: {before!r} -> {after!r}" for field, before, after in changes if field not in ignore]


def _changes(config: RunConfig, meta: dict[str, Any], tokenizer_sha256: str) -> list[str]:
    """Differences that matter and that `checkpoint.accept_changes` can accept."""
    lines = [] if "imported" in meta else _section_changes("optimizer", config, meta, _RATE_FIELDS)
    if meta["tokenizer_sha256"] != tokenizer_sha256:
        lines.insert(0, f"tokenizer: sha256 {meta['tokenizer_sha256'][:12]} -> {tokenizer_sha256[:12]}")
    return lines


def _check_changes(config: RunConfig, meta: dict[str, Any], tokenizer_sha256: str) -> None:
    free = run_config.FREE_MODEL_FIELDS | ({"num_outputs"} if "imported" in meta else set())
    model = _section_changes("model", config, meta, free)
    if _adds_adapters(config, meta):
        model = [line for line in model if not line.startswith("model.lora.")]
    if model:
        raise UserError(
            f"the checkpoint's model differs from the config's ({'; '.join(model)}): undo the change or give a new "
            "--workdir"
        )
    lines = _changes(config, meta, tokenizer_sha256)
    if lines and not config.checkpoint.accept_changes:
        raise UserError(
            f"the config changed since the checkpoint in a way that matters ({'; '.join(lines)}): undo it, give a new "
            "--workdir, or accept it with --config.checkpoint.accept_changes=true"
        )


def _log_rate_changes(config: RunConfig, meta: dict[str, Any], step: int, updates: int) -> None:
    old = _saved_config(meta)
    if config.phases or old.phases:
        _log_change_of_phases(config, old, updates, step)
    elif config.train.steps != old.train.steps:
        change = schedules.describe_change(config.optimizer, old.train.steps, config.train.steps, updates)
        logger.info("  %s", change)
    rest = set(dataclasses.asdict(config.optimizer)) - _RATE_FIELDS
    lines = _section_changes("optimizer", config, meta, rest) + _section_changes("phases", config, meta, set())
    for line in lines:
        logger.info("  changed since the checkpoint: %s", line)


def _log_change_of_phases(config: RunConfig, old: RunConfig, updates: int, step: int) -> None:
    """Log another train.steps, and another learning rate of the step after `step`, of a run with phases."""
    if config.train.steps != old.train.steps:
        logger.info("  changed since the checkpoint: train.steps: %d -> %d", old.train.steps, config.train.steps)
    before, now = (run_phases.rate_at(run_phases.split(each), step + 1, updates) for each in (old, config))
    if before != now:
        logger.info("  the learning rate of step %d goes from %.3g to %.3g", step + 1, before, now)


def _log_computation_changes(config: RunConfig, meta: dict[str, Any]) -> None:
    """Log changes of the batch, of the training loss, and of what decides the last bits on CPU."""
    old = _saved_config(meta)
    fields = (
        ("train.global_batch", old.train.global_batch, config.train.global_batch),
        ("train.batch_schedule", old.train.batch_schedule, config.train.batch_schedule),
        ("train.z_loss", old.train.z_loss, config.train.z_loss),
        ("objective.temperature", old.objective.temperature, config.objective.temperature),
        ("objective.beta", old.objective.beta, config.objective.beta),
        ("distill.alpha", old.distill.alpha, config.distill.alpha),
        ("distill.temperature", old.distill.temperature, config.distill.temperature),
        ("parallel.cpu_threads", old.parallel.cpu_threads, config.parallel.cpu_threads),
    )
    for field, before, after in fields:
        if before != after:
            logger.info("  changed since the checkpoint: %s: %r -> %r", field, before, after)


def _begun_phases(config: RunConfig, step: int) -> dict[str, Any]:
    """What the phases that began before the end of a step say of the data."""
    return {
        name: {field: value for field, value in dataclasses.asdict(phase).items() if field not in _RATE_FIELDS}
        for name, phase in config.phases.items()
        if phase.after_step < step
    }


def _restore_data_state(config: RunConfig, data: Mapping[int, TrainData], meta: dict[str, Any], step: int) -> DataState:
    """The data state of a checkpoint. Raises UserError where the config would have read other samples up to there."""
    saved, saved_config = DataState.from_json(meta["data_state"]), _saved_config(meta)
    phases = run_phases.split(config)
    of_step = data[phases[run_phases.at_step(phases, step)].rows]
    expected = run_phases.count_samples(phases, step)
    try:
        before, now = (_begun_phases(each, step) for each in (saved_config, config))
        if lines := differences(before, now, "phases"):
            listed = "; ".join(f"{field}: {old!r} -> {new!r}" for field, old, new in lines)
            raise UserError(
                f"phases that began before step {step} changed since the checkpoint ({listed}): restore them"
            )
        if config.phases and (used := of_step.count_used(saved)) != expected:
            raise UserError(
                f"the batches before step {step} changed since the checkpoint: {used} samples then, {expected} by this "
                "config; restore train.global_batch and data.skip, and change what follows by a phase with "
                f"after_step={step} or later"
            )
        of_step.check(saved)
    except UserError as error:
        if not config.checkpoint.accept_changes:
            raise UserError(f"{error}; or accept it with --config.checkpoint.accept_changes=true") from None
        logger.info("  accepted change: %s", error)
        if config.phases or saved_config.phases:
            # Where this config would be: the sample may be one of other rows, and the next start counts from phases.
            return of_step.after(expected)
    return of_step.at(saved.next_sample)
