"""What is known of accelerators by their kind: peak FLOPs, memory and power. One table for MFU, plans and costs."""

from typing import NamedTuple


class DeviceFacts(NamedTuple):
    """One JAX device. None where no source says.

    peak_flops  dense bfloat16 FLOPs a second
    memory_gib  memory in GiB
    watts       (low, high) of power in training, see `_gpu`
    """

    peak_flops: float | None
    memory_gib: int | None = None
    watts: tuple[float, float] | None = None


def _gpu(peak_flops: float, memory_gib: int | None, watts: float) -> DeviceFacts:
    """A GPU draws its maximum power at most; half of it is an assumption for training that often waits."""
    return DeviceFacts(peak_flops, memory_gib, (watts / 2, watts))


# By kind. Peaks, memory: Google Cloud's page of each TPU, NVIDIA's data sheets (without sparsity). Power of GPUs: the
# maximum of the same data sheets. Power of a TPU v4: the least and the most that Google measured, on its page; no such
# numbers are published for later TPUs.
DEVICES = {
    "TPU v4": DeviceFacts(275e12, 32, (90, 192)),
    "TPU v5 lite": DeviceFacts(197e12, 16),
    "TPU v5e": DeviceFacts(197e12, 16),
    "TPU v5": DeviceFacts(459e12, 95),
    "TPU v5p": DeviceFacts(459e12, 95),
    "TPU v6 lite": DeviceFacts(918e12, 32),
    "TPU v6e": DeviceFacts(918e12, 32),
    # A tpu7x chip's two TensorCores are two JAX devices; v4 and v5p join theirs to one.
    "TPU7x": DeviceFacts(2307e12 / 2, 96),
    "H100 PCIe": _gpu(756e12, None, 350),
    "H100 NVL": _gpu(835e12, None, 400),
    "H200 NVL": _gpu(835e12, None, 600),
    "A100 PCIE": _gpu(312e12, None, 250),
    "A100 PCIe": _gpu(312e12, None, 300),
    "A100": _gpu(312e12, 80, 400),
    "H100": _gpu(989e12, 80, 700),
    "H200": _gpu(989e12, 141, 700),
    "B200": _gpu(2250e12, 180, 1000),
    # A process of a job on CPUs, from a laptop's chip (15 W) to a socket of a server (350 W): an assumption.
    "cpu": DeviceFacts(None, None, (15, 350)),
}


def find_facts(device_kind: str) -> DeviceFacts | None:
    """The facts of a `jax.Device.device_kind`; None for an unknown one.

    A TPU's kind must match exactly, a GPU's may contain more ("NVIDIA A100-SXM4-80GB"); a MIG slice is unknown.
    """
    if device_kind.startswith("TPU"):
        return DEVICES.get(device_kind)
    words = set(device_kind.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((facts for kind, facts in DEVICES.items() if set(kind.split()) <= words), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs a second of one JAX device; None where unknown, as for a CPU."""
    facts = find_facts(device_kind)
    return None if facts is None else facts.peak_flops
