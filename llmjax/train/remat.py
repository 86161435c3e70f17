"""Resolve model.remat="auto" at the start of a run: process 0 chooses, and all processes take its choice."""

import json
import logging

from etils import epath
import jax

from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.plan import topology as topologies
from llmjax.plan.remat_choice import choose_remat
from llmjax.run import config as run_config, phases, workdir as workdirs
from llmjax.run.config import RunConfig

logger = logging.getLogger(__name__)

_CHOICE_SECONDS = 3600  # how long the other processes wait for process 0


def resolve_remat(config: RunConfig, workdir: epath.Path, *, resumes: bool) -> tuple[RunConfig, str]:
    """The config with a policy in the place of "auto", and why that one; "" for an explicit policy.

    resumes   whether there are steps to go on from: then the policy that run.json records is kept, on any devices

    The model's vocabulary and the mesh must be resolved. Raises UserError, on all processes, where process 0 cannot
    choose or no policy fits.
    """
    if config.model.remat != "auto":
        return config, ""
    answer = {}
    if hosts.is_primary():
        try:
            answer["policy"], answer["reason"] = (_recorded_choice(workdir) if resumes else None) or _choose(config)
        except UserError as error:
            answer["error"] = str(error)
    answer = json.loads(hosts.broadcast("remat", json.dumps(answer), timeout_seconds=_CHOICE_SECONDS))
    if "error" in answer:
        raise UserError(answer["error"])
    return run_config.with_fields(config, [("model.remat", answer["policy"])]), answer["reason"]


def _recorded_choice(workdir: epath.Path) -> tuple[str, str] | None:
    """(policy, reason) of an earlier choice of this run; None where it had an explicit policy."""
    record = (workdirs.read_json(workdir / workdirs.RUN) or {}).get("remat") or {}
    if not record.get("reason"):
        return None
    logger.info("model.remat='auto': %s, as this run chose at its start; set a policy to change it", record["policy"])
    return record["policy"], record["reason"]


def _choose(config: RunConfig) -> tuple[str, str]:
    """(policy, reason) for the devices of this job."""
    try:
        topology = topologies.of_devices(jax.devices())
        if topology.platform == "gpu":
            raise UserError(
                "this process holds the GPUs; run `llmjax plan --topology=gpu` with this config, which prints a policy"
            )
        slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
        logger.info("model.remat='auto': compiling the step with each policy for %s%s", slices, topology.name)
        choice = choose_remat(phases.largest_config(config), topology, host_devices=jax.local_device_count())
    except UserError as error:
        raise UserError(f"model.remat='auto': {error}; or set model.remat to a policy, such as 'attention'") from error
    if not choice.fits:
        raise UserError(
            f"model.remat='auto': {choice.policy} is {choice.reason}; raise train.accumulation, lower "
            "train.global_batch or data.seq_len, use more devices, or try a policy all the same (model.remat)"
        )
    logger.info("model.remat='auto': %s, %s", choice.policy, choice.reason)
    return choice.policy, choice.reason
