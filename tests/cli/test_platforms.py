"""JAX starts no TPU runtime where only the TPU compiler is installed."""

import glob
import importlib.metadata
import importlib.util
import os
import subprocess

import pytest

from llmjax.cli.platforms import skip_absent_tpu
from tests import jobs


@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.skipif(
    bool(
        glob.glob("/dev/accel*")
        or glob.glob("/dev/vfio/[0-9]*")
        or importlib.metadata.entry_points(group="jax_plugins")
    ),
    reason="this machine has an accelerator",
)
def test_a_command_prints_nothing_of_the_tpu_runtime():
    environment = {name: value for name, value in jobs.environment().items() if name != "JAX_PLATFORMS"}
    command = [str(jobs.LLMJAX), "size", "--config=gpt2:124M"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=True)
    assert process.stderr == ""


def test_the_users_choice_of_platforms_stays(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    skip_absent_tpu()
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
