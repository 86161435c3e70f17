"""Facts of devices by their kind: peak FLOPs and power."""

import pytest

from llmjax.parallel.device_facts import find_facts, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("TPU v9 lite", None),
        ("cpu", None),
    ],
)
def test_peak_flops_of_a_device_kind(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize(
    ("kind", "watts"),
    [
        ("TPU v4", (90, 192)),
        ("NVIDIA A100-SXM4-80GB", (200, 400)),
        ("NVIDIA A100-PCIE-40GB", (125, 250)),
        ("NVIDIA A100 80GB PCIe", (150, 300)),
        ("NVIDIA H100 80GB HBM3", (350, 700)),
        ("NVIDIA H100 PCIe", (175, 350)),
        ("NVIDIA H200", (350, 700)),
        ("cpu", (15, 350)),
    ],
)
def test_power_of_a_device_kind(kind, watts):
    facts = find_facts(kind)
    assert facts is not None and facts.watts == watts


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_power_of_later_tpus_is_not_published(kind):
    facts = find_facts(kind)
    assert facts is not None and facts.watts is None


@pytest.mark.parametrize("kind", ["NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb", "TPU v9 lite", ""])
def test_unknown_devices_have_no_facts(kind):
    assert find_facts(kind) is None
