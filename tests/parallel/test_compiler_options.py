"""`xla.flags`: defaults of each chip, and bad values."""

import jax
import jax.numpy as jnp
import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.parallel.compiler_options import XlaConfig, compiler_options

VMEM = "xla_tpu_scoped_vmem_limit_kib"


def test_flags_replace_the_defaults_of_a_chip():
    assert compiler_options(XlaConfig(), "cpu") == {}
    assert compiler_options(XlaConfig(), "TPU v6 lite") == {VMEM: "98304"}
    config = XlaConfig(flags=((VMEM, 65536), ("xla_dump_hlo_as_text", True)))
    assert compiler_options(config, "TPU v6 lite") == {VMEM: "65536", "xla_dump_hlo_as_text": "true"}


@pytest.mark.parametrize("flags", [("name",), (("name", "1", "2"),), ((1, 2),), (("--name", "1"),)])
def test_a_malformed_flag_is_refused(flags):
    with pytest.raises(UserError, match=r"xla\.flags"):
        XlaConfig(flags=flags)


def test_an_option_that_the_compiler_does_not_know_is_one_line():
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: x + 1, compiler_options={"no_such_option": "1"})(jnp.ones(()))
    assert "xla.flags: INVALID_ARGUMENT: No such compile option: 'no_such_option'" in main._hint_for(raised.value)
