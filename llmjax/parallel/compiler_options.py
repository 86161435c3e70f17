"""Options of XLA's compiler for the train step: the config's, and defaults for each TPU generation."""

from collections.abc import Mapping
import dataclasses

from llmjax.errors import UserError

# VMEM that a kernel may use, in KiB. The compiler's own limit, 16 to 32 MiB, is too small for attention blocks of 2048.
VMEM = "xla_tpu_scoped_vmem_limit_kib"
_DEFAULTS: dict[str, dict[str, str]] = {
    "TPU v5 lite": {VMEM: "98304"},
    "TPU v5e": {VMEM: "98304"},
    "TPU v5": {VMEM: "81920"},
    "TPU v5p": {VMEM: "81920"},
    "TPU v6 lite": {VMEM: "98304"},
    "TPU v6e": {VMEM: "98304"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
    """Options of the compiler for the train step, beside those of the environment variable XLA_FLAGS.

    flags   (name, value), ...; such as (("xla_tpu_scoped_vmem_limit_kib", "65536"),). Each TPU generation has defaults,
            which flags of the same name replace
    """

    flags: tuple = ()

    def __post_init__(self):
        for flag in self.flags:
            if not (isinstance(flag, tuple) and len(flag) == 2 and isinstance(flag[0], str)):
                raise UserError(f"xla.flags: {flag!r} is not a pair (name, value), such as ('{VMEM}', '65536')")
            if flag[0].startswith("-"):
                raise UserError(f"xla.flags: {flag[0]!r}: write the name without dashes")


def compiler_options(config: XlaConfig, device_kind: str) -> Mapping[str, str]:
    """All options for a kind of device, by name; values as XLA reads them."""
    flags = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in config.flags}
    return {**_DEFAULTS.get(device_kind, {}), **flags}
