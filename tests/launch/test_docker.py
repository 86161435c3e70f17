"""launch/docker/Dockerfile: its RUN lines in a clean virtual environment. The image is not built: that needs Docker."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests import jobs

DOCKERFILE = jobs.ROOT / "launch" / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, in order."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def test_only_known_instructions_are_used():
    """Others would escape the test below."""
    assert {name for name, _ in instructions()} <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "CMD"}


def test_what_is_copied_exists():
    for name, arguments in instructions():
        if name == "COPY":
            assert all((jobs.ROOT / source).exists() for source in arguments.split()[:-1]), arguments


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_run_lines_work_in_a_clean_virtual_environment(tmp_path):
    """The image for CPUs is installed; for the default EXTRAS, pip decides what it would add, such as libtpu."""
    venv, context = tmp_path / "venv", tmp_path / "context"
    # As the image, the environment has a recent pip, which resolves several times faster than that of an old Python.
    subprocess.run([sys.executable, "-m", "venv", "--upgrade-deps", str(venv)], check=True)
    context.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLMJAX_", "PYTHON"))}
    # Bytecode is half of the work, and shows nothing about the lines.
    environment |= {"VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:{os.environ['PATH']}", "PIP_COMPILE": "0"}

    def run(line: str, **more: str) -> str:
        """What a RUN line prints."""
        done = subprocess.run(
            ["sh", "-c", line], cwd=context, env=environment | more, capture_output=True, text=True, timeout=1000
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    defaults = {}
    for name, arguments in instructions():
        if name == "ARG":
            defaults.update([arguments.split("=", 1)])
        elif name == "COPY":
            *sources, target = arguments.split()
            for source in map(pathlib.Path, sources):
                destination = context / target
                if (jobs.ROOT / source).is_dir():
                    shutil.copytree(jobs.ROOT / source, destination, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(jobs.ROOT / source, destination)
        elif name == "RUN":
            run(arguments, EXTRAS="gcs")
            if "pip install" in arguments:
                assert "libtpu" in run(arguments.replace("pip install", "pip install --dry-run"), **defaults)
    assert defaults.keys() == {"EXTRAS"}
    command = subprocess.run(["llmjax", "configs"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "quickstart" in command.stdout, command.stderr
