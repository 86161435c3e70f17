"""mesh.fsdp = 0 is chosen by the training state and the device's memory."""

import dataclasses
import logging
import types

import jax
import pytest

from llmjax.parallel.mesh import MeshConfig
from llmjax.run import config as run_config, state as states
from llmjax.run.mesh_choice import choose_mesh

DATA, FSDP = MeshConfig(), MeshConfig(data=1, fsdp=-1)


def device(kind: str, memory: int | None = None):
    """What the choice reads of a device."""
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: memory and {"bytes_limit": memory})


@pytest.mark.parametrize(
    ("spec", "kind", "expected"),
    [
        ("gpt2:124M", "TPU v5 lite", DATA),
        ("gpt2:1.5B", "TPU v5 lite", FSDP),
        ("gpt2:1.5B", "TPU v5", DATA),
        ("llama:8B", "TPU v5", FSDP),
        ("llama:70B", "TPU v6 lite", dataclasses.replace(FSDP, tensor=8)),
    ],
)
def test_shipped_configs(spec, kind, expected, caplog):
    """16 bytes a parameter: 2 GB of 16 GiB, 24 GB of 16 GiB, 24 GB of 95 GiB, 128 GB, and 1.1 TB on 8 devices."""
    config = run_config.resolve(spec, ())
    with caplog.at_level(logging.INFO):
        assert choose_mesh(config, [device(kind)] * 2) == expected
    assert f"mesh.fsdp={expected.fsdp}" in caplog.text and "GiB" in caplog.text


def test_the_state_is_counted_per_device():
    """A memory of just three times the state holds it; half of that does, where `tensor` halves the state."""
    config = run_config.resolve("llama:tiny", ())
    model = dataclasses.replace(config.model, vocab_size=4096)
    size = states.state_bytes(model, config.optimizer)
    choose = lambda memory, **mesh: choose_mesh(
        dataclasses.replace(config, mesh=MeshConfig(fsdp=0, **mesh)), [device("some GPU", memory)]
    )
    assert choose(3 * size + 3) == DATA and choose(3 * size - 3) == FSDP
    assert choose(3 * size // 2 + 3, tensor=2) == dataclasses.replace(DATA, tensor=2)


def test_other_settings_decide_before_the_size():
    config = run_config.resolve("llama:8B", ())
    given = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=4))
    assert choose_mesh(given, jax.devices()) is given.mesh
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=0))
    assert choose_mesh(config, jax.devices()) == MeshConfig(data=2, fsdp=-1)
    pmap = run_config.resolve("llama:8B", (("parallel.backend", "pmap"),))
    assert choose_mesh(pmap, jax.devices()) == DATA
