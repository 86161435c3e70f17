"""Metadata files of a run: config.json, run.json (devices, sizes, restarts), data.json."""

import time
import uuid

import flax
import grain
import jax
import optax
import orbax.checkpoint as ocp

import llmjax
from llmjax.models import registry
from llmjax.parallel import hosts
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.train.context import Progress, TrainContext


def write_run_metadata(context: TrainContext, progress: Progress, unsharded: list[str]) -> None:
    """Write the run's files at a start or restart; process 0 alone."""
    if not hosts.is_primary():
        return
    path = context.workdir / workdirs.RUN
    old = (
        workdirs.read_json(path)
        if path.exists()
        else {"run_id": uuid.uuid4().hex[:12], "started": time.time(), "restarts": []}
    )
    train = context.config.train
    goes_on = path.exists() and progress.step < (train.stop_at or train.steps)  # else there is nothing left to train
    restarts = old["restarts"] + ([{"step": progress.step, "time": time.time()}] if goes_on else [])
    device = jax.devices()[0]
    by_part = registry.parameters_by_part(context.spec.shapes.params)
    workdirs.write_json(context.workdir / workdirs.CONFIG, run_config.to_json(context.config))
    workdirs.write_json(context.workdir / workdirs.DATA, context.data.summary(progress.data_state))
    workdirs.write_json(
        path,
        {
            "run_id": old["run_id"],
            "started": old["started"],
            "restarts": restarts,
            "device": device.device_kind,
            "num_devices": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(context.mesh.shape),
            "parallel": context.config.parallel.backend,
            "cpu_threads": context.config.parallel.cpu_threads,
            "versions": {
                "llmjax": llmjax.__version__,
                "jax": jax.__version__,
                "flax": flax.__version__,
                "optax": optax.__version__,
                "orbax-checkpoint": ocp.__version__,
                "grain": getattr(grain, "__version__", "unknown"),
            },
            "parameters": sum(by_part.values()),
            "parameters_by_part": by_part,
            "optimizer": context.config.optimizer.name,
            "evaluated": context.spec.optimizer.eval_params_name,
            "sharding_report": unsharded,
        },
    )


def run_summary(context: TrainContext) -> str:
    """The run in one line: parameters, devices, rows, tokens a step."""
    train, data = context.config.train, context.config.data
    mesh = " x ".join(f"{name} {size}" for name, size in context.mesh.shape.items() if size > 1) or "1 device"
    parameters = sum(registry.parameters_by_part(context.spec.shapes.params).values())
    return (
        f"{parameters:,} parameters, {jax.devices()[0].device_kind} ({mesh}), "
        f"{train.global_batch} x {data.seq_len} = {train.global_batch * data.seq_len:,} tokens a step, "
        f"{context.config.parallel.backend}"
    )
