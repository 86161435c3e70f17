"""Memory of the host and of its devices."""

import os

from llmjax.parallel import memory


def test_the_memory_of_the_host_is_at_most_the_physical_one():
    assert 1 << 28 < memory.host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_memory_of_a_cpu_is_that_of_the_host():
    assert memory.device_memory() == memory.host_memory()
