"""Options of XLA's compiler for the train step: the config's, and defaults for each TPU generation."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from llmjax.errors import UserError

# VMEM that a kernel may use, in KiB. The compiler's own limit, 16 to 32 MiB, is too small for attention blocks of 2048.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
# Above this size in MiB the compiler cuts a matmul whose operand is gathered into a ring of small pieces, and reads and
# writes their partial sums; a huge value turns this off. Worth it only where devices also split the matmul's features.
_RING_MATMUL, _NEVER = "xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000"
_DEFAULTS: dict[str, dict[str, str | bool]] = {
    "TPU v5 lite": {_VMEM: "98304"},
    "TPU v5e": {_VMEM: "98304"},
    "TPU v5": {_VMEM: "81920"},
    "TPU v5p": {_VMEM: "81920"},
    "TPU v6 lite": {_VMEM: "98304"},
    "TPU v6e": {_VMEM: "98304"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
    """Options of the compiler for the train step, beside those of the environment variable XLA_FLAGS.

    flags   (name, value), ...; such as (("xla_tpu_scoped_vmem_limit_kib", "65536"),). Each TPU generation has defaults,
            which flags of the same name replace; without a tensor axis, one keeps matmuls in one piece
    """

    flags: tuple = ()

    def __post_init__(self):
        for flag in self.flags:
            if not (isinstance(flag, tuple) and len(flag) == 2 and isinstance(flag[0], str)):
                raise UserError(f"xla.flags: {flag!r} is not a pair (name, value), such as ('{_VMEM}', '65536')")
            if flag[0].startswith("-"):
                raise UserError(f"xla.flags: {flag[0]!r}: write the name without dashes")


def compiler_options(config: XlaConfig, mesh: jax.sharding.Mesh) -> Mapping[str, str | bool]:
    """All options for the devices of a mesh, by name."""
    defaults = dict(_DEFAULTS.get(mesh.devices.flat[0].device_kind, {}))
    if defaults and mesh.shape["tensor"] == 1:
        defaults[_RING_MATMUL] = _NEVER
    return {**defaults, **{name: _option(value) for name, value in config.flags}}


def _option(value: Any) -> str | bool:
    """A flag's value as JAX takes it: XLA's own options read no bool from the text "true", those of the TPU do."""
    text = str(value)
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def vmem_limit(config: XlaConfig, device_kind: str) -> int:
    """Bytes of VMEM that a kernel may use on a TPU that has defaults."""
    return 1024 * int({**_DEFAULTS[device_kind], **dict(config.flags)}[_VMEM])
