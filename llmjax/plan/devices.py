"""Accelerators by name: peak FLOPs and memory of one JAX device; the memory of this host."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from llmjax.errors import UserError, suggest
from llmjax.parallel.device_facts import DEVICES, peak_flops
from llmjax.parallel.memory import reported_memory

# name -> jax.Device.device_kind
_KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
    "tpu7x": "TPU7x",
    "a100": "A100",
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
}
NAMES = (*_KINDS, "here")


@dataclasses.dataclass(frozen=True)
class Device:
    """One JAX device: its peak of dense FLOPs per second, and bytes of memory (None: unknown)."""

    name: str
    peak: float
    memory: int | None


def find(name: str) -> Device:
    """The device with that name; "here" is that of this machine. Raises UserError for an unknown name."""
    if name == "here":
        return _measure_local_device()
    if name not in _KINDS:
        raise UserError(f"--device={name}{suggest(name, NAMES)}: choose one of {', '.join(NAMES)}")
    facts = DEVICES[_KINDS[name]]
    assert facts.peak_flops is not None and facts.memory_gib is not None
    return Device(name, facts.peak_flops, facts.memory_gib << 30)


def _measure_local_device() -> Device:
    """This machine's first device. An unknown peak is measured by matrix products, the fastest within a second."""
    device = jax.devices()[0]
    if (peak := peak_flops(device.device_kind)) is not None:
        return Device(f"here ({device.device_kind})", peak, reported_memory(device))
    size = 1024
    x = jnp.ones((size, size), jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best, end = float("inf"), time.monotonic() + 1.0
    while time.monotonic() < end:
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return Device(f"here ({device.device_kind}, measured)", 2 * size**3 / best, reported_memory(device))
