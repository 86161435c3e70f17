"""Choose mesh.fsdp = 0: by the size of the training state and the memory of a device."""

from collections.abc import Sequence
import dataclasses
import logging
from typing import Any

from llmjax.parallel.device_facts import DEVICES
from llmjax.parallel.memory import reported_memory
from llmjax.parallel.mesh import MeshConfig
from llmjax.run import state as states
from llmjax.run.config import RunConfig

logger = logging.getLogger(__name__)

_UNKNOWN_MEMORY = 16  # GiB, of a device that reports none, as CPUs
_STATE_SHARE = 1 / 3  # of a device's memory; activations, logits and temporaries of the compiler need the rest
_UNKNOWN_VOCAB = 1 << 17  # the largest common size: the state is rather overestimated


def choose_mesh(config: RunConfig, devices: Sequence[Any], *, frozen_bytes: int = 0) -> MeshConfig:
    """The config's mesh, with `fsdp` chosen where it is 0; logs the choice and its reason.

    fsdp becomes 1, so that every device holds the whole state, where a third of a device's memory holds it: matmuls
    stay whole, and only gradients are sent. Otherwise, and where `data` is not -1, fsdp becomes -1, all remaining
    devices. The choice depends on the config and the kind of the devices, not on their number.

    frozen_bytes   of parameters that the state carries besides the model's, those of a teacher
    """
    mesh = config.mesh
    if mesh.fsdp != 0:
        return mesh
    if mesh.data != -1:
        logger.info("mesh.fsdp=0: all devices that mesh.data=%d leaves (mesh.fsdp=-1)", mesh.data)
        return dataclasses.replace(mesh, fsdp=-1)
    if config.parallel.backend == "pmap":
        logger.info("mesh.fsdp=0: parallel.backend='pmap' replicates the state (mesh.fsdp=1)")
        return dataclasses.replace(mesh, fsdp=1)
    vocab = config.model.vocab_size or config.data.tokenizer.vocab_size or _UNKNOWN_VOCAB
    model = dataclasses.replace(config.model, vocab_size=vocab)
    size = states.state_bytes(model, config.optimizer) + frozen_bytes
    size /= (mesh.expert * mesh.sequence * mesh.tensor) * 2**30
    kind, memory = devices[0].device_kind, _memory(devices[0])
    fits = size <= _STATE_SHARE * memory
    if len(devices) > 1:
        logger.info(
            "mesh.fsdp=0: the training state of %.2f GiB %s a third of %s's %.0f GiB: %s",
            size,
            "fits in" if fits else "is larger than",
            kind,
            memory,
            "every device holds it (mesh.fsdp=1)" if fits else "sharded over all devices (mesh.data=1, mesh.fsdp=-1)",
        )
    return dataclasses.replace(mesh, fsdp=1) if fits else dataclasses.replace(mesh, data=1, fsdp=-1)


def _memory(device: Any) -> float:
    """Memory of a device in GiB."""
    facts = DEVICES.get(device.device_kind)
    if facts and facts.memory_gib:  # what other programs use does not change it, so every start chooses alike
        return facts.memory_gib
    reported = reported_memory(device)
    return reported / 2**30 if reported else _UNKNOWN_MEMORY
