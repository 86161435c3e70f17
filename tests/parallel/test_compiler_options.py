"""`xla.flags`: defaults of each chip, and bad values."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.parallel.compiler_options import XlaConfig, compiler_options
from llmjax.parallel.mesh import MeshConfig, make_mesh

VMEM, RING = "xla_tpu_scoped_vmem_limit_kib", "xla_jf_spmd_threshold_for_windowed_einsum_mib"


def v6e_mesh(**sizes: int) -> Any:
    """What `compiler_options` reads of a mesh of TPU v6e: no such devices are here."""
    devices = np.array([types.SimpleNamespace(device_kind="TPU v6 lite")])
    return types.SimpleNamespace(devices=devices, shape={"fsdp": 1, "tensor": 1, **sizes})


def test_flags_replace_the_defaults_of_a_chip():
    assert compiler_options(XlaConfig(), make_mesh(MeshConfig())) == {}
    assert compiler_options(XlaConfig(), v6e_mesh(tensor=2)) == {VMEM: "98304"}
    config = XlaConfig(flags=((VMEM, 65536), ("xla_dump_hlo_as_text", True)))
    assert compiler_options(config, v6e_mesh(tensor=2)) == {VMEM: "65536", "xla_dump_hlo_as_text": True}


def test_matmuls_stay_whole_without_a_tensor_axis_unless_a_flag_says_otherwise():
    assert compiler_options(XlaConfig(), v6e_mesh(fsdp=8))[RING] == "1000000"
    assert compiler_options(XlaConfig(flags=((RING, 64),)), v6e_mesh(fsdp=8))[RING] == "64"


@pytest.mark.parametrize("value", [True, False, "true", "False"])
def test_a_flag_that_is_true_or_false_is_read_by_the_compiler(value):
    config = XlaConfig(flags=(("xla_cpu_enable_fast_math", value),))
    options = dict(compiler_options(config, make_mesh(MeshConfig())))
    assert jax.jit(lambda x: x + 1, compiler_options=options)(jnp.ones(())) == 2


@pytest.mark.parametrize("flags", [("name",), (("name", "1", "2"),), ((1, 2),), (("--name", "1"),)])
def test_a_malformed_flag_is_refused(flags):
    with pytest.raises(UserError, match=r"xla\.flags"):
        XlaConfig(flags=flags)


def test_an_option_that_the_compiler_does_not_know_is_one_line():
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: x + 1, compiler_options={"no_such_option": "1"})(jnp.ones(()))
    assert "xla.flags: INVALID_ARGUMENT: No such compile option: 'no_such_option'" in main._hint_for(raised.value)
