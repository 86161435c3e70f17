"""The cache of compiled programs in a job of several processes, and the connections that wait for no compiler."""

import pathlib
import re
import sys

import pytest

from llmjax.parallel import compilation_cache
from tests import jobs

pytestmark = pytest.mark.multiprocess


def start(*folders: pathlib.Path) -> list[list[str]]:
    """Run a job of two processes with these cache folders: the lines of each."""
    command = [sys.executable, "-m", "tests.parallel.programs_worker", *map(str, folders)]
    printed = jobs.run(jobs.launch(command, 2, 2), PYTHONPATH=str(jobs.ROOT))
    return [re.findall(rf"^\[p{process}\] (.*)$", printed, re.MULTILINE) for process in (0, 1)]


def counts(lines: list[str]) -> tuple[int, int]:
    """(hits, misses), after a check that the sums are right."""
    found = re.fullmatch(r"sums 28.0 28.0 28.0 hits (\d+) misses (\d+)", lines[-1])
    assert found, lines
    return int(found[1]), int(found[2])


def test_every_process_finds_its_programs(tmp_path):
    """The second start compiles nothing on any process, and one whose cache was deleted still meets the others."""
    shared = tmp_path / "shared"
    first = start(shared, shared)
    programs = counts(first[0])[1]
    assert programs >= 3
    assert [counts(lines) for lines in first] == [(0, programs)] * 2
    assert [counts(lines) for lines in start(shared, shared)] == [(programs, 0)] * 2
    uneven = start(shared, tmp_path / "empty")
    assert [counts(lines) for lines in uneven] == [(programs, 0), (0, programs)]

    # Gloo greets each connection. All are made before the mesh is returned, so that none waits for a later compilation.
    for lines in (*first, *uneven):
        connected = lines.index("connected")
        assert any("[Gloo]" in line for line in lines[:connected])
        assert not any("[Gloo]" in line for line in lines[connected:])


def test_another_number_of_cpu_threads_uses_other_programs(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(compilation_cache.jax.config, "update", seen.__setitem__)
    compilation_cache.enable(str(tmp_path), 8)
    compilation_cache.enable("off", 2)
    assert seen["jax_compilation_cache_dir"] == f"{tmp_path}/cpu_threads_8"
