"""Memory of this host and of its devices."""

import os
import pathlib
from typing import Any

import jax


def host_memory() -> int:
    """Bytes of this host's memory that all its processes may use: physical, or the least limit of a control group."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = pathlib.Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = pathlib.Path("/sys/fs/cgroup", controllers)
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a container's own group may be mounted as the root
            if folder.is_relative_to(root) and (folder / name).exists():
                text = (folder / name).read_text().strip()
                sizes += [int(text)] if text.isdecimal() else []
    return min(sizes)


def reported_memory(device: Any) -> int | None:
    """Bytes that a device's backend gives to arrays; None if it does not say, as for CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def device_memory() -> int | None:
    """Bytes that arrays on the first device may use: those of the host for a CPU; None if the backend does not say."""
    device = jax.local_devices()[0]
    return host_memory() if device.platform == "cpu" else reported_memory(device)
