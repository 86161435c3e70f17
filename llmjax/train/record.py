"""Metadata files of a run: config.json, run.json (devices, sizes, restarts), data.json."""

import importlib.metadata
import time
from typing import Any
import uuid

from etils import epath
import jax

import llmjax
from llmjax.metrics import read_metrics
from llmjax.models import registry
from llmjax.parallel import hosts
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.train.context import Progress, TrainContext
from llmjax.train.phases import summarize_data
from llmjax.train.program import step_compiler_options

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")


def write_run_metadata(context: TrainContext, progress: Progress, unsharded: list[str]) -> None:
    """Write config.json, run.json and data.json at a start or restart; process 0 alone."""
    if not hosts.is_primary():
        return
    path = context.workdir / workdirs.RUN
    old = workdirs.read_json(path)
    old_remat = (old or {}).get("remat") or {}
    restarts, starts = ([], []) if old is None else (old["restarts"], old.get("starts", []))
    if old is not None and progress.step < context.last_step:
        restarts = [*restarts, {"step": progress.step, "time": time.time()}]
    if old is None or progress.step < context.last_step:
        starts = [*starts, _describe_start(context, progress)]
    attention = run_config.choose_attention(context.config)
    policy = context.config.model.remat
    # A resumed run reads the policy from config.json, where it is explicit; the reason stays on record with it.
    reason = context.remat_reason or (old_remat.get("reason", "") if old_remat.get("policy") == policy else "")
    target_len = context.objective.target_len
    by_part = registry.parameters_by_part(context.spec.shapes.params)
    workdirs.write_json(context.workdir / workdirs.CONFIG, run_config.to_json(context.config))
    workdirs.write_json(
        context.workdir / workdirs.DATA, summarize_data(context.phases, progress.step, progress.data_state)
    )
    workdirs.write_json(
        path,
        {
            "run_id": uuid.uuid4().hex[:12] if old is None else old["run_id"],
            "started": time.time() if old is None else old["started"],
            "restarts": restarts,
            "starts": starts,
            "device": jax.devices()[0].device_kind,
            "num_devices": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(jax.sharding.get_mesh().shape),
            "backend": context.config.parallel.backend,
            "attention": None if attention is None else str(attention),
            "remat": {"policy": policy, "reason": reason},
            "cpu_threads": context.config.parallel.cpu_threads,
            "compiler_options": step_compiler_options(context.config),
            "versions": {
                "llmjax": llmjax.__version__,
                **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            },
            "parameters": sum(by_part.values()),
            "parameters_by_part": by_part,
            "trained_parameters": context.spec.count_trained(),
            "optimizer": context.config.optimizer.name,
            "eval_params": context.spec.optimizer.eval_params_name,
            "unsharded_params": unsharded,
            "teacher": None if context.teacher is None else context.teacher.to_json(context.config, target_len),
        },
    )


def _describe_start(context: TrainContext, progress: Progress) -> dict[str, Any]:
    """What the cost of a run is computed from; `write_end` adds the seconds."""
    return {
        "step": progress.step,
        "time": context.started,
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def write_last_end(workdir: epath.Path) -> None:
    """Write when the last start ended by the last line of its metrics, where it could not write that; process 0 alone.

    A start that logged no step gets no end.
    """
    lines = read_metrics(workdir) if hosts.is_primary() else []
    if lines and "time" in lines[-1]:
        write_end(workdir, lines[-1]["time"])


def write_end(workdir: epath.Path, end: float) -> None:
    """Write into run.json how many seconds the last start ran, unless that is known; process 0 alone.

    end   in seconds since 1970
    """
    path = workdir / workdirs.RUN
    run = workdirs.read_json(path) if hosts.is_primary() else None
    starts = (run or {}).get("starts")
    if run is not None and starts and "seconds" not in starts[-1] and end > starts[-1]["time"]:
        starts[-1]["seconds"] = end - starts[-1]["time"]
        workdirs.write_json(path, run)


def run_summary(context: TrainContext) -> str:
    """The run in one line: parameters, devices, rows and tokens per step."""
    train, data = context.config.train, context.config.data
    axes = [f"{name} {size}" for name, size in jax.sharding.get_mesh().shape.items() if size > 1]
    mesh = " x ".join(axes) or "1 device"
    parameters = sum(registry.parameters_by_part(context.spec.shapes.params).values())
    trained = context.spec.count_trained()
    some = "" if trained == parameters else f", of which {trained:,} ({trained / parameters:.2%}) are trained"
    later = "".join(f"{size} rows from sample {start}, " for start, size in train.batch_schedule)
    return (
        f"{parameters:,} parameters{some}, {jax.devices()[0].device_kind} ({mesh}), "
        f"{train.global_batch} x {data.seq_len} = {train.global_batch * data.seq_len:,} tokens a step, {later}"
        f"{context.config.parallel.backend}"
    )
