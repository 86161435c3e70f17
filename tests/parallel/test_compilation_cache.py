"""The compilation cache of a job of several processes, and connections that do not wait for a compilation."""

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
    match = re.fullmatch(r"sums 28.0 28.0 28.0 hits (\d+) misses (\d+)", lines[-1])
    assert match, lines
    return int(match[1]), int(match[2])


def test_every_process_finds_its_programs_at_the_second_start(tmp_path):
    """A process whose cache was deleted compiles again, and the others wait for it."""
    shared = tmp_path / "shared"
    first = start(shared, shared)
    programs = counts(first[0])[1]
    assert programs >= 3
    assert [counts(lines) for lines in first] == [(0, programs)] * 2
    assert [counts(lines) for lines in start(shared, shared)] == [(programs, 0)] * 2
    uneven = start(shared, tmp_path / "empty")
    assert [counts(lines) for lines in uneven] == [(programs, 0), (0, programs)]

    # Gloo prints a line for each connection. All are opened before `make_mesh` returns, so none waits for a compiler.
    for lines in (*first, *uneven):
        connected = lines.index("connected")
        assert any("[Gloo]" in line for line in lines[:connected])
        assert not any("[Gloo]" in line for line in lines[connected:])


def test_another_number_of_cpu_threads_uses_other_programs(tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(compilation_cache.jax.config, "update", settings.__setitem__)
    compilation_cache.enable(str(tmp_path), 8)
    compilation_cache.enable("off", 2)
    assert settings["jax_compilation_cache_dir"] == f"{tmp_path}/cpu_threads_8"
